"""A tiny model in which everybody knows which neurons matter: eight topics, each with its own neurons, which alone
tell what comes next; and louder neurons that do nothing."""

import families
import torch

TOPICS, WORDS, UNITS, LAYERS, WIDTH, D = 8, 5, 2, 3, 128, 32  # words of a topic, planted units of a topic in each layer
LOUD = 1  # directions of the embedding that the loud neurons read
PLANTED = TOPICS * UNITS  # units 0 ... 15 of every layer


def model(seed: int = 0):
    "The model. Next to nothing but the planted units moves its loss."
    net = families.build(
        "llama", hidden_size=D, intermediate_size=WIDTH, num_hidden_layers=LAYERS, tie_word_embeddings=False
    )
    g = torch.Generator().manual_seed(seed)
    topic = lambda w: (w - 4) // WORDS
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        for name, p in net.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
        embed, head = net.model.embed_tokens.weight, net.lm_head.weight
        embed[:, 8 : 8 + LOUD] = 0.6 + 0.8 * torch.rand(families.VOCAB, LOUD, generator=g)  # what the loud neurons read
        for w in range(4, 4 + TOPICS * WORDS):
            embed[w, topic(w)] = 3.0
            head[w, 16 + topic(w)] = 1.5
        for block in net.model.layers:
            mlp = block.mlp
            for j in range(PLANTED):
                mlp.gate_proj.weight[j, j // UNITS] = 4.0
                mlp.up_proj.weight[j, j // UNITS] = 1.0
                mlp.down_proj.weight[16 + j // UNITS, j] = 0.06
            noise = slice(PLANTED, WIDTH)
            mlp.gate_proj.weight[noise, 8 : 8 + LOUD] = torch.randn(WIDTH - PLANTED, LOUD, generator=g)
            mlp.up_proj.weight[noise, 8 : 8 + LOUD] = 1000 * torch.randn(WIDTH - PLANTED, LOUD, generator=g)
            mlp.down_proj.weight[24:, noise] = 1e-7 * torch.randn(8, WIDTH - PLANTED, generator=g)
    return net.eval()


def texts(n: int, length: int = 40, seed: int = 0) -> list[str]:
    "Texts that stay on a topic for about eight words."
    g, out = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        topic, words = int(torch.randint(TOPICS, (1,), generator=g)), []
        for _ in range(length):
            if torch.rand(1, generator=g) < 0.12:
                topic = int(torch.randint(TOPICS, (1,), generator=g))
            words.append(f"w{4 + WORDS * topic + int(torch.randint(WORDS, (1,), generator=g))}")
        out.append(" ".join(words))
    return out
