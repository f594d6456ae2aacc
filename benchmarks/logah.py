"""LoGAH: sizes, the time and memory of a start for GPT-2 Large, and the cost of a training step.

    python benchmarks/logah.py [--json FILE]

CPU times of one thread, candidates in turn, median over rounds; each figure beside its bound.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from layers import row
from timing import in_turn, run_sections

from stiefel.init import LoGAH, MeanFieldDecoder, gpt_graph, graph_from_module
from stiefel.init.logah.decoders import as_kernel

LARGE = {"n_layer": 36, "n_embd": 1280}
PUBLISHED = {"tiny": 2_540_380, "small": 21_412_794, "base": 78_231_892, "large": 289_423_316}


def sizes(rounds: int) -> list[dict]:
    """Parameters of the hypernetworks beside the published totals."""
    rows = []
    for name, published in PUBLISHED.items():
        with torch.device("meta"):
            ours = sum(p.numel() for p in LoGAH.preset(name).parameters())
        off = 100 * abs(ours / published - 1)
        rows.append(row(f"size of {name}, % off", ours / 1e6, published / 1e6, off, "≤ 1", "M"))
    return rows


def gpt2_large(rounds: int) -> list[dict]:
    """A whole start of GPT-2 Large in a process of its own, for its peak memory."""
    found = subprocess.run(
        [sys.executable, __file__, "--start", str(rounds)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    init, normal, graph, peak, model = map(float, found)
    return [
        row("GPT-2 Large, graph and init_, s", init + graph, 60, init + graph, "≤ 6", "s"),
        row("decode against normal_", 1e3 * init, 1e3 * normal, init / normal, "≤ 1"),
        row("peak RSS, GB", peak, model, peak, "≤ 6", "GB"),
        row("peak beyond the model, MB", 1e3 * peak, 1e3 * model, 1e3 * (peak - model), "≤ 357",
            "MB"),
    ]  # fmt: skip


def start() -> None:
    """What :func:`gpt2_large` asks for: seconds of init_, normal_, graph; GB of peak and model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**LARGE, n_head=20)
    began = time.process_time()
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    graph = graph_from_module(model)
    exported = time.process_time() - began
    model = model.to_empty(device="cpu")
    model.tie_weights()
    hypernetwork = LoGAH(vocabulary=50257)
    normal, init = [], []
    for _ in range(int(sys.argv[2])):
        began = time.process_time()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        normal.append(time.process_time() - began)
        held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        began = time.process_time()
        hypernetwork.init_(model, graph)
        init.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(median(init), median(normal), exported, peak / 1e9, held / 1e9)


def decoding(rounds: int) -> list[dict]:
    """Only the rows that are read, against the whole tables of the paper, forward and backward."""
    decoder = LoGAH.preset("tiny").decoder
    h = torch.randn(48, 64)
    r, width = decoder.rank, decoder.max_width

    def paper(d: int):
        def run():
            z = decoder.latent(torch.relu(decoder.trunk(h))).view(-1, 2 * r, r)
            T = decoder.widen(torch.relu(z)).view(-1, 2 * width, r)
            as_kernel(T[:, :d] @ T[:, width : width + d].mT, (d, d)).square().sum().backward()

        return run

    def ours(d: int):
        return lambda: decoder(h, (d, d)).square().sum().backward()

    times = in_turn({"ours": ours(128), "peer": paper(128)}, rounds=rounds)
    mean_field = MeanFieldDecoder(64, 32)
    times_mean = in_turn(
        {"ours": lambda: mean_field(h, (128, 128)).square().sum().backward(), "peer": paper(128)},
        rounds=rounds,
    )
    return [
        row("48 matrices of 128², paper's decoder", 1e3 * times["ours"], 1e3 * times["peer"],
            times["peer"] / times["ours"], "≥ 3"),
        row("the same, mean-field decoder", 1e3 * times_mean["ours"], 1e3 * times_mean["peer"],
            times_mean["peer"] / times_mean["ours"], "≥ 3"),
    ]  # fmt: skip


def encoding(rounds: int) -> list[dict]:
    """Bias of attention for distinct pairs, against all pairs."""
    encoder = LoGAH().encoder
    graph = gpt_graph(12, 768)

    def all_pairs():
        there, back = graph.A.long() + 2, graph.A.T.long() + 2
        both = torch.cat([encoder.path(there), encoder.path(back)], -1)
        encoder.edge(both).permute(2, 0, 1).contiguous()

    graph.pairs  # noqa: B018 - once for each architecture
    times = in_turn({"ours": lambda: encoder.pair_bias(graph), "peer": all_pairs}, rounds=rounds)
    ratio = times["peer"] / times["ours"]
    return [row("pair bias, GPT-2", 1e3 * times["ours"], 1e3 * times["peer"], ratio, "≥ 3")]


SECTIONS = {
    "sizes": sizes, "gpt2_large": gpt2_large, "decoders": decoding, "encoder": encoding,
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--start" in sys.argv:
        start()
    else:
        run_sections("LoGAH", __doc__.split("\n")[0], SECTIONS, {}, Path("build/logah.json"))
