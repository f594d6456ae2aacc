"""The engine against the same methods on whole state dicts, and against plain float32 formulas."""

import json
import math
from dataclasses import replace

import pytest
import torch
from engine_models import SHAPES, contents, load, only, plan, random_model, save

from stiefel.checkpoint import Checkpoint, CheckpointError
from stiefel.merge import dare, engine_inputs, linear, slerp, task_arithmetic, ties
from stiefel.merge.engine import merge
from stiefel.merge.engine_work import Gate, NonFiniteError

WEIGHTS = (0.3, 0.9)
EACH = [{"weight": w, "density": d} for w, d in zip(WEIGHTS, (0.25, 0.5), strict=True)]


@pytest.fixture
def models(tmp_path):
    base = random_model(0)
    tensors = [base, random_model(1, base=base), random_model(2, base=base)]
    return tensors, [
        save(tmp_path / "in" / name, t) for name, t in zip("bxy", tensors, strict=True)
    ]


@pytest.fixture(params=[4_000_000, 100])
def chunk(request, monkeypatch):
    """Whole tensors, and a few rows at a time."""
    monkeypatch.setattr(engine_inputs, "CHUNK_BYTES", request.param)


def lifted(tensors):
    return [{name: x.float() for name, x in model.items()} for model in tensors]


def equal(result, expected, dtype=torch.bfloat16):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name].dtype == dtype
        assert torch.equal(result[name], value.to(dtype)), name


@pytest.mark.usefixtures("chunk")
class TestMethods:
    """Row by row gives the bits of the whole tensor."""

    @pytest.mark.parametrize("normalize", [True, False])
    def test_linear(self, models, tmp_path, normalize):
        tensors, folders = models
        made = plan(folders[1:], "linear", base=False, each=EACH,
                    parameters={"normalize": normalize})  # fmt: skip
        merge(made, tmp_path / "out")
        result = load(tmp_path / "out")
        equal(result, linear(lifted(tensors[1:]), WEIGHTS, normalize=normalize))
        # The formula itself in float32, products and sums fused as mergekit's are.
        weights = torch.tensor(WEIGHTS)
        for name in SHAPES:
            x, y = (model[name].float() for model in tensors[1:])
            total = torch.zeros_like(x).addcmul(x, weights[0]).addcmul(y, weights[1])
            total = total / weights.sum() if normalize else total
            assert torch.equal(result[name], total.bfloat16())

    def test_slerp(self, models, tmp_path):
        tensors, folders = models
        merge(plan(folders[:2], "slerp", parameters={"t": 0.3}, each=[{}]), tmp_path / "out")
        equal(load(tmp_path / "out"), slerp(*lifted(tensors[:2]), 0.3))

    @pytest.mark.parametrize("normalize", [True, False])
    def test_task_arithmetic(self, models, tmp_path, normalize):
        tensors, folders = models
        shared = {"lambda": 0.7, "normalize": normalize}
        merge(plan(folders, "task_arithmetic", each=EACH, parameters=shared), tmp_path / "out")
        base, *others = lifted(tensors)
        wanted = task_arithmetic(base, others, WEIGHTS, scale=0.7, normalize=normalize)
        equal(load(tmp_path / "out"), wanted)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_ties(self, tmp_path, dtype):
        base = random_model(0, dtype)
        tensors = [base, random_model(1, dtype, base), random_model(2, dtype, base)]
        folders = [save(tmp_path / n, t) for n, t in zip("bxy", tensors, strict=True)]
        merge(plan(folders, "ties", each=EACH, parameters={"lambda": 0.7}), tmp_path / "out")
        base, *others = tensors if dtype == torch.float64 else lifted(tensors)
        wanted = ties(base, others, WEIGHTS, density=[0.25, 0.5], scale=0.7)
        equal(load(tmp_path / "out"), wanted, dtype)

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
    @pytest.mark.parametrize("rescale", [True, False])
    def test_dare(self, models, tmp_path, method, rescale):
        tensors, folders = models
        made = plan(folders, method, each=EACH, parameters={"rescale": rescale}, seed=3)
        merge(made, tmp_path / "out")
        base, *others = lifted(tensors)
        consensus = "sum" if method == "dare_ties" else None
        wanted = dare(base, others, WEIGHTS, density=[0.25, 0.5], seed=3, rescale=rescale,
                      consensus=consensus)  # fmt: skip
        equal(load(tmp_path / "out"), wanted)

    def test_copy_casts_and_keeps_integers(self, tmp_path):
        tensors = {"w": torch.randn(30, 4), "steps": torch.arange(50), "on": torch.tensor([True])}
        folders = [save(tmp_path / "in", tensors)]
        made = plan(folders, "copy", base=False)
        made = replace(made, tasks=tuple(
            replace(task, dtype=torch.float16) if task.name == "w" else task
            for task in made.tasks
        ))  # fmt: skip
        merge(made, tmp_path / "out")
        result = load(tmp_path / "out")
        assert torch.equal(result["w"], tensors["w"].half())
        assert torch.equal(result["steps"], tensors["steps"])
        assert torch.equal(result["on"], tensors["on"])

    def test_rows_of_other_vocabularies(self, models, tmp_path):
        """Rows through a map; a missing token from the fallback, or zero without one."""
        tensors, folders = models
        name = "model.embed_tokens.weight"
        first = plan(folders[1:], "linear", base=False, each=EACH)
        task = next(task for task in first.tasks if task.name == name)
        x, y = task.sources
        rows = torch.tensor([*range(5, 40), -1, -1, 0, 2, -1, 7])
        fallback = replace(x, rows=torch.arange(39, -2, -1))
        x = replace(x, rows=torch.arange(41) % 40)
        zero = replace(fallback, fallback=None)
        for low, sources in ((zero, (x, replace(y, rows=rows, fallback=zero))),
                             (None, (x, replace(y, rows=rows)))):  # fmt: skip
            made = only(first, name, shape=(41, 12), sources=sources)
            merge(made, tmp_path / "out")
            left = tensors[1][name].float()[torch.arange(41) % 40]
            right = tensors[2][name].float()[rows.clamp(min=0)]
            other = tensors[1][name].float()[torch.arange(39, -2, -1).clamp(min=0)]
            other[40] = 0
            missing = (rows < 0)[:, None]
            right = torch.where(missing, other if low else torch.zeros(()), right)
            equal(load(tmp_path / "out"), {name: linear([left, right], WEIGHTS)})


def test_wider_output(models, tmp_path):
    tensors, folders = models
    made = plan(folders[1:], "linear", base=False, each=EACH, dtype=torch.float32)
    merge(made, tmp_path / "out")
    equal(load(tmp_path / "out"), linear(lifted(tensors[1:]), WEIGHTS), torch.float32)


def test_inputs_of_different_types(tmp_path):
    x, y = random_model(0, torch.float32), random_model(1, torch.float16)
    folders = [save(tmp_path / "x", x), save(tmp_path / "y", y)]
    merge(plan(folders, "linear", base=False, each=EACH), tmp_path / "out")
    equal(load(tmp_path / "out"), linear(lifted([x, y]), WEIGHTS), torch.float32)


def test_threads_and_shards_do_not_show(models, tmp_path):
    made = plan(models[1], "ties", each=EACH, shard_bytes=700)
    for threads in (1, 4):
        merge(made, tmp_path / str(threads), threads=threads)
    first = contents(tmp_path / "1")
    assert first == contents(tmp_path / "4")
    assert "model.safetensors.index.json" in first
    merge(replace(made, shard_bytes=10**9), tmp_path / "single", threads=2)
    one, many = load(tmp_path / "single"), load(tmp_path / "1")
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_report_and_further_files(models, tmp_path):
    _, folders = models
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    made = plan(
        folders, "ties", each=EACH, parameters={"lambda": 1.0}, warnings=("look",),
        files_to_copy={"tokenizer.json": tokenizer, "chat.jinja": tokenizer},
        files_to_write={"chat.jinja": "{{ x }}"},
    )  # fmt: skip
    report = merge(made, tmp_path / "out")
    written = contents(tmp_path / "out")
    content = json.loads(written["merge.json"])
    assert content == json.loads(json.dumps(report.content))
    assert sorted(content["output"]["files"]) == sorted(written)
    assert written["config.json"] == b'{\n  "model_type": "test"\n}\n'
    assert written["tokenizer.json"] == b"{}"
    assert written["chat.jinja"] == b"{{ x }}"
    assert content["recipe"] == made.recipe_text
    assert content["warnings"] == ["look"]
    assert list(report.tensors) == [task.name for task in made.tasks]
    entry = report.tensors["model.layers.0.mlp.weight"]
    assert entry["sources"][1] == {"model": "y", "weight": 0.9, "density": 0.5}
    assert entry["shape"] == [24, 12]
    assert len(entry["thresholds"]) == 2
    with Checkpoint(folders[1]) as x:
        assert report.inputs[1] == {"model": "x", "files": x.fingerprint()}
        digest = x.fingerprint()["model.safetensors"]
    recipe = written["stiefel_merge.yaml"].decode()
    assert recipe.endswith(made.recipe_text)
    assert f"# x: model.safetensors sha256 {digest}" in recipe
    assert report.nbytes == sum(task.nbytes for task in made.tasks)


def test_progress(models, tmp_path, monkeypatch):
    from stiefel.merge import engine_progress

    monkeypatch.setattr(engine_progress, "SECONDS_BETWEEN", 0)
    told = []
    merge(plan(models[1], "ties", each=EACH), tmp_path / "out", threads=3, progress=told.append)
    fractions = [state.fraction for state in told]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < 1
    assert fractions[-1] == pytest.approx(1)
    assert max(state.done for state in told) == len(SHAPES) == told[0].total
    assert all(state.remaining is None or state.remaining >= 0 for state in told)
    assert told[-1].remaining == pytest.approx(0, abs=1e-6)
    assert {state.tensor for state in told} >= set(SHAPES)


class TestNotFinite:
    """NaN and infinities in the inputs, under each policy."""

    @pytest.fixture
    def spoilt(self, models, tmp_path):
        tensors, folders = models
        bad = {name: value.clone() for name, value in tensors[2].items()}
        bad["model.layers.0.mlp.weight"][3, 4] = float("nan")
        bad["model.layers.0.mlp.weight"][20] = float("inf")
        bad["scale"] = torch.tensor(float("-inf")).bfloat16()
        return bad, [*folders[:2], save(tmp_path / "bad", bad)]

    @pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear"])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_error_names_every_tensor(self, spoilt, tmp_path, method, threads):
        folders = spoilt[1]
        made = plan(folders, method, base=method != "linear",
                    each=EACH if method != "linear" else [*EACH, {"weight": 1.0}])  # fmt: skip
        with pytest.raises(NonFiniteError) as caught:
            merge(made, tmp_path / "out", threads=threads)
        assert len(caught.value.findings) == 2
        text = str(caught.value)
        assert "bad: model.layers.0.mlp.weight holds 13 NaN or infinities among 288" in text
        assert "bad: scale holds 1 NaN" in text
        assert "allow_nonfinite: base" in text
        assert not (tmp_path / "out").exists()

    def test_base(self, spoilt, tmp_path):
        bad, folders = spoilt
        made = plan(folders, "ties", each=EACH, on_nonfinite="base")
        report = merge(made, tmp_path / "out")
        base, x = load(folders[0]), load(folders[1])
        mended = {n: torch.where(v.isfinite(), v, base[n]) for n, v in bad.items()}
        wanted = ties(*[lifted([base])[0]], lifted([x, mended]), WEIGHTS, density=[0.25, 0.5])
        equal(load(tmp_path / "out"), wanted)
        assert report.tensors["scale"]["replaced_by_base"] == {"bad": 1}
        assert report.tensors["model.layers.0.mlp.weight"]["replaced_by_base"] == {"bad": 13}
        assert "replaced_by_base" not in report.tensors["model.layers.1.mlp.weight"]

    def test_base_that_is_bad_itself(self, spoilt, tmp_path):
        folders = spoilt[1][::-1]
        with pytest.raises(NonFiniteError, match="bad: scale"):
            merge(plan(folders, "ties", each=EACH, on_nonfinite="base"), tmp_path / "out")

    def test_keep(self, spoilt, tmp_path):
        made = plan(spoilt[1], "task_arithmetic", each=EACH, on_nonfinite="keep")
        report = merge(made, tmp_path / "out")
        result = load(tmp_path / "out")
        assert int((~result["model.layers.0.mlp.weight"].isfinite()).sum()) == 13
        assert report.tensors["model.layers.0.mlp.weight"]["not_finite"] == 13
        assert "not_finite" not in report.tensors["model.layers.1.mlp.weight"]

    def test_overflow_of_the_output(self, tmp_path):
        tensors = {"w": torch.full((3, 3), 6e4)}
        folders = [save(tmp_path / name, tensors) for name in "xy"]
        made = plan(folders, "linear", base=False, each=[{"weight": 1.0}] * 2, dtype=torch.float16,
                    parameters={"normalize": False})  # fmt: skip
        with pytest.raises(NonFiniteError, match="w: the result overflows float16") as caught:
            merge(made, tmp_path / "out")
        assert "allow_nonfinite" not in str(caught.value)  # no input is bad


class TestOutputFolder:
    """What may be replaced."""

    def test_an_earlier_merge(self, models, tmp_path):
        merge(plan(models[1], "ties", each=EACH, shard_bytes=700), tmp_path / "out")
        merge(plan(models[1], "ties", each=EACH), tmp_path / "out")
        assert len(contents(tmp_path / "out")) == 4

    def test_an_input(self, models, tmp_path):
        merge(plan(models[1], "ties", each=EACH), tmp_path / "out")
        again = plan([tmp_path / "out", *models[1][1:]], "ties", each=EACH)
        before = contents(tmp_path / "out")
        with pytest.raises(CheckpointError, match="would replace the input"):
            merge(again, tmp_path / "out")
        assert contents(tmp_path / "out") == before

    def test_an_empty_folder(self, models, tmp_path):
        (tmp_path / "out").mkdir()
        merge(plan(models[1], "ties", each=EACH), tmp_path / "out")

    def test_anything_else(self, models, tmp_path):
        made = plan(models[1], "ties", each=EACH)
        with pytest.raises(CheckpointError, match="was not written by a merge"):
            merge(made, models[1][0])
        assert (models[1][0] / "model.safetensors").exists()
        merge(made, tmp_path / "out")
        (tmp_path / "out/README.md").write_text("mine")
        with pytest.raises(CheckpointError, match=r"no merge wrote \(README\.md\)"):
            merge(made, tmp_path / "out")
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="is a file"):
            merge(made, tmp_path / "file")


def test_bad_arguments(models, tmp_path):
    made = plan(models[1], "ties", each=EACH)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        merge(made, tmp_path / "out", threads=0)
    with pytest.raises(ValueError, match="no method 'xor'"):
        merge(plan(models[1], "xor"), tmp_path / "out")
    with pytest.raises(ValueError, match="ties needs a base"):
        merge(plan(models[1], "ties", base=False, each=[{"weight": 1.0}] * 3), tmp_path / "out")
    with pytest.raises(ValueError, match="linear needs weight for each source"):
        merge(plan(models[1], "linear", base=False, each=[{}] * 3), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_while_read(models, tmp_path):
    _, folders = models

    def touch(state):
        with open(folders[1] / "model.safetensors", "r+b") as file:
            file.write(b"\0")

    with pytest.raises(CheckpointError, match="changed"):
        merge(plan(folders, "ties", each=EACH), tmp_path / "out", progress=touch)


def test_gate_lets_large_ones_in_alone():
    import threading

    gate, inside, most = Gate(10), [], []
    lock = threading.Lock()

    def work(cost):
        with gate.hold(cost):
            with lock:
                inside.append(cost)
                most.append(sum(inside))
            threading.Event().wait(0.002)
            with lock:
                inside.remove(cost)

    costs = [3, 4, 25, 5, 9, 1, 25, 6] * 3
    threads = [threading.Thread(target=work, args=(cost,)) for cost in costs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == len(costs)
    assert all(total <= 10 or total == 25 for total in most)
    assert 10 >= max(total for total in most if total != 25) > 6  # and several at a time


class TestRotations:
    """OrthoMerge: what the report and the warnings tell."""

    @staticmethod
    def turned(tmp_path, angles):
        """A base and experts that are the base turned in one plane."""
        torch.manual_seed(0)
        weight = torch.randn(8, 4, dtype=torch.float64)
        models = {"b": weight}
        for number, angle in enumerate(angles):
            r = torch.eye(4, dtype=torch.float64)
            cosine, sine = math.cos(angle), math.sin(angle)
            r[:2, :2] = torch.tensor([[cosine, -sine], [sine, cosine]])
            models[str(number)] = weight @ r
        folders = [save(tmp_path / n, {"up.weight": w}) for n, w in models.items()]
        made = plan(folders, "orthomerge", each=[{"weight": 1.0}] * len(angles),
                    parameters={"residual": "ta"})  # fmt: skip
        report = merge(made, tmp_path / "out")
        return weight, load(tmp_path / "out")["up.weight"], report

    def test_equal_rotations(self, tmp_path):
        weight, result, report = self.turned(tmp_path, [0.4, 0.4])
        entry = report.tensors["up.weight"]
        assert entry["correction"] == pytest.approx(1)
        assert entry["rotations"] == pytest.approx([math.sqrt(2) * math.tan(0.2)] * 2)
        assert entry["residuals"] == pytest.approx([0, 0], abs=1e-7)
        assert not report.warnings
        cosine, sine = math.cos(0.4), math.sin(0.4)
        wanted = cosine * weight[:, 0] + sine * weight[:, 1]
        torch.testing.assert_close(result[:, 0], wanted)

    def test_rotations_that_cancel(self, tmp_path):
        weight, result, report = self.turned(tmp_path, [0.4, -0.4])
        torch.testing.assert_close(result, weight)
        assert report.warnings == ["up.weight: the rotations cancel, the layer is not turned"]

    def test_a_layer_that_nobody_moved(self, tmp_path):
        """Rotations made of rounding do not cancel: there is nothing to warn of."""
        weight, result, report = self.turned(tmp_path, [0.0, 0.0])
        assert 0 < sum(report.tensors["up.weight"]["rotations"]) < 1e-12
        torch.testing.assert_close(result, weight)
        assert report.warnings == []

    def test_a_layer_in_which_nobody_counts(self, models, tmp_path):
        """A filter or a gradient may give all experts the weight 0: the base stays."""
        made = plan(models[1], "orthomerge", each=[{"weight": 0.0}] * 2)
        merge(made, tmp_path / "out")
        base = load(models[1][0])
        for name, value in load(tmp_path / "out").items():
            torch.testing.assert_close(value, base[name], rtol=0, atol=0)

    def test_a_half_turn(self, tmp_path):
        _, _, report = self.turned(tmp_path, [math.pi - 1e-5, 0.2])
        assert len(report.warnings) == 1
        assert "up.weight: an expert turns a plane by almost π" in report.warnings[0]

    def test_threads_do_not_show(self, models, tmp_path):
        made = plan(models[1], "orthomerge", each=EACH)
        for threads in (1, 3):
            merge(made, tmp_path / str(threads), threads=threads)
        assert contents(tmp_path / "1") == contents(tmp_path / "3")

    def test_nan_is_named(self, models, tmp_path):
        bad = {name: x.clone() for name, x in models[0][1].items()}
        bad["model.layers.0.mlp.weight"][0, 0] = float("nan")
        folders = [*models[1][:2], save(tmp_path / "bad", bad)]
        for policy in ("error", "keep"):
            made = plan(folders, "orthomerge", each=EACH, on_nonfinite=policy)
            with pytest.raises(NonFiniteError, match=r"bad: model\.layers\.0\.mlp\.weight holds 1"):
                merge(made, tmp_path / "out")
        merge(plan(folders, "orthomerge", each=EACH, on_nonfinite="base"), tmp_path / "out")
