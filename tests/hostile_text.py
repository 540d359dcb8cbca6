"Text that breaks pages whose makers forget to escape it: markup, templates' own signs, what is not seen but acts."

EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></table><script>",
    "</blockquote><iframe src=https://example.org>",
    "javascript:alert(1)",
    "<!-- <script>",
    "]]>",
    "{{ 7 * 7 }} {% raw %} {# note #}",
    "$title ${style} $$",
    "&lt;b&gt; &amp;",
    "{0} %s",
    "\\u003cb\\u003e",
    "\u2028\u2029",
    "\x00\x1b[2J\x9b",
    "\u202eabc",
    "a\r\nb",
    "w" * 90,
]
