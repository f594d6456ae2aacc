"""A whole model: files, modules, damage, memory, comparison, a run, the page."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from stiefel.checkpoint import CheckpointError
from stiefel.diagnose import compare, diagnose, trajectory, weibull_fit
from stiefel.diagnose import page as page_module
from stiefel.diagnose.page import count, number, percent, render, tint


def llama(seed=0, layers=8, scale=0.02, width=64):
    g = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return scale * torch.randn(*shape, generator=g)

    state = {
        "model.embed_tokens.weight": matrix(300, width),
        "model.norm.weight": torch.ones(width),
    }
    for i in range(layers):
        start = f"model.layers.{i}"
        for kind, out in {"q": width, "k": width // 2, "v": width // 2, "o": width}.items():
            state[f"{start}.self_attn.{kind}_proj.weight"] = matrix(out, width)
        for kind, shape in {"gate": (96, width), "up": (96, width), "down": (width, 96)}.items():
            state[f"{start}.mlp.{kind}_proj.weight"] = matrix(*shape)
        state[f"{start}.input_layernorm.weight"] = torch.ones(width)
    return state


CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path):
    save_file(llama(), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_every_matrix_has_a_row(folder):
    report = diagnose(folder)
    state = llama()
    assert {row.name for row in report.matrices} == {n for n, w in state.items() if w.ndim == 2}
    for row in report.matrices:
        fit = weibull_fit(state[row.name], method="bits")
        assert (row.k, row.lam, row.r2) == pytest.approx((fit.k, fit.lam, fit.r2), rel=1e-12)
        rms = float(state[row.name].square().mean().sqrt())
        assert row.lam_over_rms == pytest.approx(fit.lam / rms, rel=5e-3)
    assert report.skipped == 9
    assert report.model["attention"] == "GQA"
    assert report.model["type"] == "llama"
    assert report.model["parameters"] == sum(w.numel() for w in state.values())


def test_medians_by_kind(folder):
    report = diagnose(folder)
    ks = sorted(row.k for row in report.matrices if row.kind == "up")
    assert report.summary["up"].k == (ks[3] + ks[4]) / 2
    assert (report.summary["up"].k_min, report.summary["up"].k_max) == (ks[0], ks[-1])
    assert report.summary["ffn"].count == 24
    assert len(report.neighbours) == 3


def test_embeddings_have_their_moments(folder):
    from stiefel.diagnose import cosine_moments

    (space,) = diagnose(folder).embeddings
    stats = cosine_moments(llama()["model.embed_tokens.weight"])
    assert (space.mean, space.std) == pytest.approx((stats.mean, stats.std), abs=1e-9)
    assert sum(space.histogram) == 300 * 299 // 2
    assert space.capacity is None  # ε is 0.25
    assert space.excess == pytest.approx(1, abs=0.05)


def test_files_modules_and_state_dicts_agree(folder):
    state = llama()
    reports = [diagnose(folder), diagnose(state), diagnose(folder / "model.safetensors")]
    for report in reports[1:]:
        ours = {row.name: row.k for row in report.matrices}
        assert ours == {row.name: row.k for row in reports[0].matrices}
    module = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(40, 40)})
    report = diagnose(module)
    assert [(row.name, row.kind) for row in report.matrices] == [("q_proj.weight", "q")]
    assert report.matrices[0].label == "above_anchor"  # uniform, as nn.Linear starts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    state = {n: w.to(dtype) for n, w in llama(layers=1).items()}
    save_file(state, tmp_path / "model.safetensors")
    for row in diagnose(tmp_path).matrices:
        assert row.dtype == str(dtype).removeprefix("torch.")
        assert row.k == pytest.approx(weibull_fit(state[row.name].float()).k, abs=0.02)


def test_fused_projections_come_apart_unless_told_not_to():
    state = {"h.0.attn.c_attn.weight": 0.02 * torch.randn(64, 192)}
    state["h.0.attn.c_attn.weight"][:, :64] *= 50
    rows = diagnose(state).matrices
    assert [row.name.rpartition("[")[2] for row in rows] == ["q]", "k]", "v]"]
    assert rows[0].lam / rows[1].lam == pytest.approx(50, rel=0.05)
    (whole,) = diagnose(state, split_qkv=False).matrices
    assert whole.kind == "qkv"
    assert whole.r2 < rows[0].r2


def test_chunks_do_not_matter(folder, monkeypatch):
    from stiefel.diagnose import sources

    plain = diagnose(folder)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    again = diagnose(folder)
    assert again.matrices == plain.matrices
    assert again.embeddings[0].histogram == plain.embeddings[0].histogram
    assert again.embeddings[0].eps == pytest.approx(plain.embeddings[0].eps, abs=1e-7)


class TestFindings:
    def texts(self, state):
        return {f.tensor: f for f in diagnose(state).findings}

    def test_a_healthy_model_has_none(self):
        report = diagnose(llama())
        assert report.findings == []
        assert not report.serious

    def test_nan_is_serious_and_the_rest_is_analysed(self):
        state = llama()
        name = "model.layers.2.mlp.up_proj.weight"
        state[name][0, :3] = math.nan
        report = diagnose(state)
        assert report.serious
        (finding,) = report.findings
        assert finding.tensor == name
        assert "3 entries are NaN" in finding.text
        assert len(report.matrices) == 57
        assert next(row for row in report.matrices if row.name == name).k is not None

    def test_zeros_constants_and_quantised_weights_are_told(self):
        state = llama()
        state["model.layers.0.mlp.up_proj.weight"][:10] = 0
        state["model.layers.1.mlp.up_proj.weight"][:] = 0.5
        state["model.layers.2.mlp.up_proj.weight"][:] = 0
        w = state["model.layers.3.mlp.up_proj.weight"]
        state["model.layers.3.mlp.up_proj.weight"] = (w / w.abs().max() * 7).round() / 7
        found = self.texts(state)
        assert (
            "10.4% of the entries are exactly zero"
            in found["model.layers.0.mlp.up_proj.weight"].text
        )
        assert "No fit: 1 distinct" in found["model.layers.1.mlp.up_proj.weight"].text
        assert found["model.layers.2.mlp.up_proj.weight"].serious
        assert "model.layers.3.mlp.up_proj.weight" in found

    def test_a_block_apart_is_named(self):
        state = llama(width=128)
        name = "model.layers.5.self_attn.q_proj.weight"
        state[name] = torch.distributions.StudentT(2.0).sample((128, 128)) * 0.02
        found = self.texts(state)
        assert "in block 5, where q has" in found[name].text

    def test_duplicate_rows_of_an_embedding(self):
        state = llama()
        state["model.embed_tokens.weight"][10:30] = state["model.embed_tokens.weight"][3]
        assert "21 of 300 sampled rows" in self.texts(state)["model.embed_tokens.weight"].text

    def test_eight_bit_floats_are_a_problem_not_a_crash(self, tmp_path):
        state = llama(layers=1)
        name = "model.layers.0.mlp.up_proj.weight"
        state[name] = state[name].to(torch.float8_e4m3fn)
        save_file(state, tmp_path / "model.safetensors")
        report = diagnose(tmp_path)
        assert "dequantise" in report.problems[name]
        assert report.serious
        assert len(report.matrices) == 7


def test_bad_sources(tmp_path):
    with pytest.raises(CheckpointError):
        diagnose(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError):
        diagnose(tmp_path)
    with pytest.raises(ValueError, match="has no tensors"):
        diagnose({})
    with pytest.raises(ValueError, match="trim"):
        diagnose(llama(), trim=0.0)


def test_progress_goes_from_nothing_to_all():
    seen = []
    diagnose(llama(layers=1), progress=lambda part, name: seen.append(part))
    assert seen[0] == 0
    assert seen[-1] == 1
    assert seen == sorted(seen)


def test_memory_stays_flat(tmp_path):
    """A matrix of 192 MB: less than half of it is ever held, though the sheet allows twice."""
    save_file(
        {"model.layers.0.mlp.up_proj.weight": torch.randn(12_000, 4096)}, tmp_path / "a.safetensors"
    )
    code = (
        "import resource, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from stiefel.diagnose import diagnose, weibull_fit\n"
        "weibull_fit(torch.randn(300_000))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "diagnose(sys.argv[1])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.safetensors")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(run.stdout) < 90


def test_json_is_plain(folder):
    report = diagnose({**llama(), "x.q_proj.weight": torch.ones(20, 20)})
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["matrices"][-1]["k"] is None


class TestComparison:
    def test_changes_are_sorted_and_counted_in_errors(self):
        a, b = llama(), llama()
        b["model.layers.1.self_attn.q_proj.weight"] **= 3
        del b["model.layers.7.mlp.up_proj.weight"]
        b["extra.q_proj.weight"] = torch.randn(30, 30)
        found = compare(diagnose(a), diagnose(b))
        assert found.changes[0].name == "model.layers.1.self_attn.q_proj.weight"
        assert found.changes[0].k[1] == pytest.approx(found.changes[0].k[0] / 3, rel=0.01)
        assert found.changes[0].errors > 10
        assert found.changes[-1].errors == 0
        assert found.only_first == ["model.layers.7.mlp.up_proj.weight"]
        assert found.only_second == ["extra.q_proj.weight"]
        eps = found.embeddings["model.embed_tokens.weight"]
        assert eps[0] == eps[1]

    def test_a_run_shows_growth(self):
        reports = [diagnose(llama(scale=s)) for s in (0.02, 0.03, 0.05)]
        run = trajectory(reports)
        assert run.lam["q"] == pytest.approx([run.lam["q"][0] * s for s in (1, 1.5, 2.5)], rel=1e-3)
        assert run.attribution["q"] == "lambda_dominated"
        short = llama()
        for name in [n for n in short if "q_proj" in n]:
            del short[name]
        run = trajectory([*reports, diagnose(short)])
        assert run.lam["q"][-1] is None
        assert "q" not in run.attribution
        with pytest.raises(ValueError, match="two checkpoints"):
            trajectory(reports[:1])


class TestPage:
    def test_it_stands_alone_and_escapes_what_it_was_given(self, folder):
        state = llama()
        state["<script>alert(1)</script>.q_proj.weight"] = torch.zeros(20, 20)
        text = render([diagnose(state)])
        assert "<script>" not in text
        assert "&lt;script&gt;alert(1)" in text
        assert not re.search(r"(?:src|href)=", text)
        assert "default-src 'none'" in text
        for mark in ("k by block and component", "λ over depth", "Overlaps of", "What is unusual"):
            assert mark in text

    def test_the_raw_numbers_are_the_report(self, folder):
        import html

        report = diagnose(folder)
        text = render([report])
        raw = html.unescape(re.search(r"<pre>(.*)</pre>", text, re.DOTALL).group(1))
        assert json.loads(raw)["reports"][0] == json.loads(json.dumps(report.to_json()))

    def test_two_models_and_a_run(self):
        a, b = diagnose(llama()), diagnose(llama(1, scale=0.05))
        text = render([a, b], comparison=compare(a, b))
        assert "Two models side by side" in text
        assert "ε of model.embed_tokens.weight" in text
        text = render([a, b], trajectory=trajectory([a, b]))
        assert "A run, checkpoint by checkpoint" in text
        assert "lambda dominated" in text

    def test_models_without_blocks_or_embeddings(self):
        for state in ({"x.weight": torch.randn(30, 30)}, {"x.weight": torch.ones(3)}):
            assert "What is unusual" in render([diagnose(state)])

    def test_numbers(self):
        assert [number(v) for v in (None, math.nan, 1.23456, -0.5, 123456.0, 0)] == [
            "–", "–", "1.235", "−0.5", "1.23 · 10⁵", "0",
        ]  # fmt: skip
        assert number(1.234e-7) == "1.23 · 10⁻⁷"
        assert count(1234567) == "1\u202f234\u202f567"
        assert percent(0.1234) == "12.3 %"

    def test_colours_grow_with_the_distance(self):
        assert tint(1.205, 1.205) == "at"
        assert tint(None, 1.205) == "none"
        below = [tint(1.205 - d, 1.205) for d in (0.04, 0.1, 0.2, 0.9)]
        assert below == ["below-1", "below-2", "below-3", "below-5"]
        assert tint(1.375, 1.205) == "above-3"

    def test_missing_jinja_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(page_module.MissingPackageError, match=r"stiefel\[atlas\]"):
            render([diagnose(llama(layers=1))])
