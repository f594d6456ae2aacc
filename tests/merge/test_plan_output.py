"""What a plan says of the output: files, room, memory, time; and the parts it is made of."""

import json
import re
import time

import plan_models_on_disk as disk
import pytest
import torch
from plan_models_on_disk import STACK, TIES, plan, problems
from safetensors.torch import save_file

import stiefel.merge.plan as plan_module
from stiefel.merge.plan import build_plan, check_output, output_bytes
from stiefel.merge.plan_layers import depth, find_layers, match_names, stands_before
from stiefel.merge.plan_report import bytes_text, estimate, plan_json, plan_lines, seconds_text
from stiefel.merge.recipe import parse_recipe


@pytest.fixture
def folder(tmp_path):
    """base, a and b: the same architecture, other numbers."""
    for seed, name in enumerate(("base", "a", "b")):
        disk.write(tmp_path / name, seed=seed)
    return tmp_path


# What comes with the weights, and where it goes.


def test_files_beside_the_weights(folder):
    base = folder / "base"
    for name in ("generation_config.json", "tokenizer_config.json", "README.md", "model.py"):
        (base / name).write_text("{}")
    disk.write(base, settings=disk.config(auto_map={"AutoModel": "model.M"}))
    made = plan(folder, TIES + "chat_template: '{{ messages }}'\n")
    assert sorted(made.files_to_copy) == [
        "config.json", "generation_config.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert made.files_to_write == {"chat_template.jinja": "{{ messages }}"}
    assert "model.py" in made.warnings[0]
    assert "model.py" in plan(folder, trust_remote_code=True).files_to_copy


def test_links_out_of_the_folder_are_not_copied(folder):
    """A hostile tokenizer.json -> ~/.ssh/id_ed25519 must not reach what is then given away."""
    (folder / "secret").write_text("{}")
    base = folder / "base"
    (base / "tokenizer_config.json").symlink_to(folder / "secret")
    (base / "generation.json").write_text("{}")
    (base / "generation_config.json").symlink_to(base / "generation.json")
    (base / "model.py").symlink_to(folder / "secret")
    made = plan(folder, trust_remote_code=True)
    assert sorted(made.files_to_copy) == ["config.json", "generation_config.json"]
    assert [w.partition(" is a link out of the folder")[0] for w in made.warnings] == [
        "base: tokenizer_config.json",
        "base: model.py",
    ]


def test_files_of_a_download_cache_are_copied(folder):
    """There every file is a link: snapshots/REVISION/NAME to blobs/HASH."""
    snapshot, blobs = folder / "hub" / "snapshots" / "1", folder / "hub" / "blobs"
    disk.write(snapshot)
    blobs.mkdir()
    (blobs / "ab").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to(blobs / "ab")
    text = TIES.replace("base_model: base", "base_model: hub/snapshots/1")
    assert "tokenizer_config.json" in plan(folder, text).files_to_copy


def test_the_dtype_goes_under_the_key_that_is_there(folder):
    settings = disk.config()
    del settings["torch_dtype"]
    disk.write(folder / "base", settings={**settings, "text_config": {"dtype": "float32"}})
    made = plan(folder, TIES + "dtype: float32\nout_dtype: float16\n")
    assert "torch_dtype" not in made.config
    assert made.config["text_config"] == {"dtype": "float16"}
    assert {task.dtype for task in made.tasks} == {torch.float16}


def test_the_output_is_no_input(folder):
    assert "would replace the input" in problems(folder, out=folder / "a")
    assert "would replace the input" in problems(folder, out=folder)
    (folder / "file").write_text("")
    assert "it must be a folder" in problems(folder, out=folder / "file")
    assert plan(folder, out=folder / "a" / "inside")
    assert "cannot be an output" in problems(folder, out="/")


def test_the_disk_has_room(folder, monkeypatch):
    made = plan(folder, out=folder / "out")
    usage = type("usage", (), {"free": output_bytes(made) - 1})
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda path: usage)
    (problem,) = check_output(folder / "deep" / "out", made)
    assert "bytes free" in problem.message
    (folder / "out.partial").mkdir()
    (folder / "out.partial" / "model.safetensors").write_bytes(b"x")  # room that is taken already
    assert check_output(folder / "out", made) == []


def test_seven_billion_parameters_are_planned_in_two_seconds(tmp_path):
    for name in ("base", "a", "b"):
        disk.sparse_llama(
            tmp_path / name, layers=32, width=4096, inner=11008, vocab=32000, shards=3
        )
    recipe = parse_recipe(
        TIES.replace("weight: 0.5}", "weight: [{filter: mlp, value: [0, 1]}, {value: 1}]}")
    )
    start = time.thread_time()
    made = build_plan(recipe, tmp_path, out=tmp_path / "out")
    assert time.thread_time() - start < 2
    assert len(made.tasks) == 291
    assert sum(task.nbytes for task in made.tasks) == 13_476_831_232
    estimated = estimate(made, threads=2)
    assert estimated.output_files == 3
    assert estimated.group_bytes == 3 * 2 * 32000 * 4096
    assert estimated.peak_bytes < 3 * estimated.group_bytes + 300e6


# Parts.


def test_layers_are_found_by_their_numbers():
    names = [f"vision.blocks.{i}.w" for i in range(5)]
    names += [f"text.h.{i}.{x}" for i in range(3) for x in ("a", "experts.7.b")]
    assert find_layers(names, {"n_layer": 3}).prefix == "text.h."
    assert find_layers(names, {"text_config": {"num_hidden_layers": 5}}).prefix == "vision.blocks."
    found = find_layers(names, None)
    assert (found.prefix, found.count) == ("text.h.", 3)
    assert found.split("text.h.2.experts.7.b") == (2, "experts.7.b")
    assert found.split("text.h.3.a") is None
    assert found.split("text.h.x.a") is None
    assert found.split("vision.blocks.1.w") is None
    assert find_layers(["a.1.w", "a.3.w", "b"], None).prefix is None


def test_depth_and_sides():
    assert [depth(i, 3) for i in range(3)] == [0, 0.5, 1]
    assert depth(0, 1) == 1
    for name in ("model.embed_tokens.weight", "transformer.wpe.weight", "bert.embeddings.x"):
        assert stands_before(name)
    for name in ("lm_head.weight", "model.norm.weight", "embed_out.weight"):
        assert not stands_before(name)


def test_names_match_exactly_first():
    found = match_names(["model.a", "b", "model.c"], ["model.a", "a", "model.b", "c", "d"])
    assert found == {"model.a": "model.a", "b": "model.b", "model.c": "c"}


def test_the_plan_as_numbers_and_as_lines(folder):
    made = plan(folder, STACK)
    estimated = estimate(made)
    content = plan_json(made, estimated)
    assert json.loads(json.dumps(content))["tensors"] == 15
    assert content["methods"] == {"copy": 13, "linear": 2}
    words = [word for word, _ in plan_lines(made, estimated, 1)]
    assert words == ["read", "read", "merge", "write", "memory", "time"]
    with pytest.raises(ValueError, match="threads"):
        estimate(made, threads=0)
    with pytest.raises(ValueError, match="shard_bytes"):
        plan(folder, shard_bytes=0)


def test_shards_are_counted_as_the_writer_fills_them(folder):
    made = plan(folder, shard_bytes=700)
    room, files = 0, 0
    for task in made.tasks:
        if files == 0 or task.nbytes > room:
            files, room = files + 1, 700
        room -= task.nbytes
    assert estimate(made).output_files == files


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (25e6, "25 MB"), (2e13, "20 TB")],
)
def test_sizes_for_people(size, text):
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "a second"), (42, "42 s"), (600, "10 min"), (7200, "2.0 h")]
)
def test_durations_for_people(seconds, text):
    assert seconds_text(seconds) == text


def test_single_files_are_models_too(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        save_file(disk.tensors(seed), tmp_path / f"{name}.safetensors")
    text = re.sub(r"(model: (?:base|a|b))\b", r"\1.safetensors", TIES)
    made = plan(tmp_path, text)
    assert made.config is None
    assert "no config.json" in made.warnings[0]
