"""Tiny models in which everybody knows which neurons matter: one with eight topics, each with its own neurons, which
alone tell what comes next, and louder neurons that do nothing; and one with two tasks of two neurons each."""

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


TASKS = {"one": [(1, 5), (2, 9)], "two": [(0, 3), (1, 20)]}  # (layer, neuron) of each task


def task_model(shared: bool = False):
    """A model in which two neurons alone carry the word w10 or w11 at the end of a text to the answer w20 or w21, and
    two others w12 or w13 to w22 or w23. shared=True: the first two do both."""
    net = families.build("llama", num_hidden_layers=3, tie_word_embeddings=False)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.zero_()
        embed, head = net.model.embed_tokens.weight, net.lm_head.weight
        embed[:, 3], embed[:, 1] = 3.0, 1.0
        for block in net.model.layers:  # all neurons are active at all words, so that no word looks like a sink
            block.mlp.gate_proj.weight[:, 1], block.mlp.up_proj.weight[:, 1] = 2.0, 1.0
        for word, answer, read, write, task in ((10, 20, 0, 2, "one"), (12, 22, 4, 5, "one" if shared else "two")):
            embed[word, read], embed[word + 1, read] = 3.0, -3.0
            head[answer, write], head[answer + 1, write] = 1.0, -1.0
            for layer, neuron in TASKS[task]:
                mlp = net.model.layers[layer].mlp
                if not mlp.down_proj.weight[:, neuron].any():
                    mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = 0.0, 0.0
                mlp.gate_proj.weight[neuron, 1], mlp.up_proj.weight[neuron, read] = 2.0, 1.0
                mlp.down_proj.weight[write, neuron] = 1.0
    return net


def task_pairs(task: str = "one", n: int = 12):
    "Pairs of texts that end in the words of a task, with their answers."
    from llmfact_nb.scores.contrast import ContrastPair, ContrastSet

    word, answer = {"one": (10, 20), "two": (12, 22)}[task]
    clean = {f"w{i}": "w15" for i in (10, 11, 12, 13)}
    starts = [" ".join(clean.get(w, w) for w in families.words(5, seed=i).split()) for i in range(n)]
    ends = [(f"{s} w{word}", f"{s} w{word + 1}", f" w{answer}", f" w{answer + 1}", "end") for s in starts]
    return ContrastSet(task, tuple(ContrastPair(*parts) for parts in ends))
