import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stiefel.init import shrink_perturb, shrink_perturb_, shrink_perturb_file


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def test_exact_value():
    old, fresh = torch.tensor([[1.0, -2], [3, 0.5]]), torch.tensor([[0.2, 0.4], [-0.6, 0.8]])
    mixed = shrink_perturb({"w": old}, {"w": fresh}, 0.4, 0.1)["w"]
    torch.testing.assert_close(
        mixed, torch.tensor([[0.42, -0.76], [1.14, 0.28]]), atol=1e-7, rtol=0
    )
    assert old[0, 0] == 1
    assert fresh[1, 1] == torch.tensor(0.8)


def test_agrees_with_the_module_form():
    module, fresh = net(0), net(1)
    module(torch.randn(30, 4))
    mixed = shrink_perturb(module.state_dict(), fresh.state_dict(), 0.4, 0.1)
    shrink_perturb_(module, 0.4, 0.1, fresh=fresh)
    for name, t in module.state_dict().items():
        assert torch.equal(mixed[name], t), name
    assert mixed["1.num_batches_tracked"] == 0


def test_one_and_zero_is_a_copy_bit_for_bit():
    module = net(0)
    module(torch.randn(30, 4))
    old = module.state_dict()
    mixed = shrink_perturb(old, net(1).state_dict(), 1, 0)
    for name, t in old.items():
        assert torch.equal(mixed[name], t)
        assert mixed[name].data_ptr() != t.data_ptr()


def test_shrink_zero_drops_nan():
    mixed = shrink_perturb({"w": torch.tensor([torch.nan])}, {"w": torch.ones(1)}, 0, 1)
    assert torch.equal(mixed["w"], torch.ones(1))


def test_named_buffers_are_taken_over():
    old, fresh = (
        {"scale": torch.ones(2), "w": torch.ones(2)},
        {
            "scale": torch.full((2,), 9.0),
            "w": torch.zeros(2),
        },
    )
    mixed = shrink_perturb(old, fresh, 0.5, 0.5, buffers=["sc*"])
    assert torch.equal(mixed["scale"], fresh["scale"])
    assert mixed["scale"] is not fresh["scale"]
    assert torch.equal(mixed["w"], torch.full((2,), 0.5))


def test_entries_that_share_memory_still_do():
    weight, other = torch.ones(3, 3), torch.zeros(3, 3)
    mixed = shrink_perturb({"a": weight, "b": weight}, {"a": other, "b": other}, 0.5, 0)
    assert mixed["a"] is mixed["b"]


def test_empty_tensors_are_not_taken_for_one_another():
    mixed = shrink_perturb(
        {"a": torch.ones(0), "b": torch.ones(0)}, {"a": torch.ones(0), "b": torch.ones(0)}
    )
    assert mixed["a"] is not mixed["b"]


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        ({}, "fresh has no w"),
        ({"w": torch.ones(3)}, r"w is \(2,\) but \(3,\) in fresh"),
        ({"w": torch.ones(2), "v": torch.ones(2)}, "fresh has v"),
    ],
)
def test_mismatches(fresh, message, tmp_path):
    old = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        shrink_perturb(old, fresh)
    save_file(old, tmp_path / "old.safetensors")
    save_file(fresh, tmp_path / "fresh.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("old", "fresh", "out")]
    with pytest.raises(ValueError, match=message):
        shrink_perturb_file(*paths)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh.safetensors", "old.safetensors"]


@pytest.mark.parametrize("factors", [(1.5, 0.1), (-1, 0.1), (0.4, -0.1), (0.4, float("nan"))])
def test_factors_out_of_range(factors, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        shrink_perturb({"w": torch.ones(1)}, {"w": torch.ones(1)}, *factors)
    with pytest.raises(ValueError, match="must be"):
        shrink_perturb_file("a", "b", tmp_path / "c", *factors)


def test_files_give_what_state_dicts_give(tmp_path):
    old = {
        "a.weight": torch.randn(5, 7),
        "h.weight": torch.randn(4, 3).bfloat16(),
        "n.running_var": torch.rand(3),
        "n.num_batches_tracked": torch.tensor(4),
        "none": torch.ones(0, 2),
    }
    fresh = {name: torch.ones_like(t) for name, t in old.items()}
    paths = [tmp_path / f"{name}.safetensors" for name in ("old", "fresh", "out")]
    save_file(old, paths[0], metadata={"format": "pt"})
    save_file(fresh, paths[1])
    shrink_perturb_file(*paths, 0.4, 0.1)
    expected = shrink_perturb(old, fresh, 0.4, 0.1)
    loaded = load_file(paths[2])
    assert loaded.keys() == old.keys()
    for name, t in loaded.items():
        assert t.dtype == old[name].dtype
        assert torch.equal(t, expected[name])
    raw = paths[2].read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + size])["__metadata__"] == {"format": "pt"}
    shrink_perturb_file(paths[0], paths[1], paths[0], 0.4, 0.1)  # over itself
    assert paths[0].read_bytes() == raw


@pytest.mark.parametrize("content", [b"", b"12345", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{]"])
def test_files_of_another_kind_are_refused(tmp_path, content):
    good, bad, target = (tmp_path / name for name in ("good", "bad", "target"))
    save_file({"w": torch.ones(2)}, good)
    bad.write_bytes(content)
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="is no safetensors file"):
            shrink_perturb_file(*pair, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "good"]
