"""Heads tied to embeddings, and vocabularies that differ."""

import json
from pathlib import Path

import plan_models_on_disk as disk
import pytest
from plan_models_on_disk import TIES, by_name, plan, problems

from stiefel.merge.plan_tokens import (
    Vocabulary,
    VocabularyError,
    read_vocabulary,
    rows_by_place,
    rows_for,
)


@pytest.fixture
def folder(tmp_path):
    """base, a and b: the same architecture, other numbers."""
    for seed, name in enumerate(("base", "a", "b")):
        disk.write(tmp_path / name, seed=seed)
    return tmp_path


# Heads that are tied to the embedding.


def tied(folder, seed):
    return disk.write(folder, disk.tensors(seed, head=False), disk.config(tie_word_embeddings=True))


def test_tied_models_have_no_head(folder):
    for seed, name in enumerate(("base", "a", "b")):
        tied(folder / name, seed)
    assert "lm_head.weight" not in by_name(plan(folder))
    # A copy of the embedding that a tied model was saved with is never read.
    disk.write(folder / "a", disk.tensors(1), disk.config(tie_word_embeddings=True))
    assert "lm_head.weight" not in by_name(plan(folder))


def test_one_untied_head_unties_the_output(folder):
    tied(folder / "base", 0)
    tied(folder / "b", 2)
    made = plan(folder)
    task = by_name(made)["lm_head.weight"]
    assert task.base.tensor == "model.embed_tokens.weight"
    assert [ref.tensor for ref in task.sources] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert made.config["tie_word_embeddings"] is False
    assert "embedding and head of base, but not of a" in made.warnings[0]
    assert "allow_tied: untie" in problems(folder, TIES + "allow_tied: error\n")


def test_a_tied_model_gives_its_embedding_for_a_head(folder):
    tied(folder / "a", 1)
    made = plan(folder)
    task = by_name(made)["lm_head.weight"]
    assert task.sources[0].tensor == "model.embed_tokens.weight"
    assert "config.json" in made.files_to_copy
    assert "allow_tied" in problems(folder, TIES + "allow_tied: error\n")


# Vocabularies.

WORDS = [f"w{i}" for i in range(10)]


def with_tokens(folder, base, a, b=None):
    disk.write(folder / "base", seed=0, vocab=len(base), tokens=base)
    disk.write(folder / "a", seed=1, vocab=len(a), tokens=a)
    b = base if b is None else b
    disk.write(folder / "b", seed=2, vocab=len(b), tokens=b)


def test_equal_tokenizers_need_no_rows(folder):
    with_tokens(folder, WORDS, WORDS)
    made = plan(folder)
    assert all(ref.rows is None for task in made.tasks for ref in task.sources)
    assert made.files_to_copy["tokenizer.json"] == folder / "base" / "tokenizer.json"


def test_rows_are_matched_token_by_token(folder):
    a = [WORDS[1], WORDS[0], *WORDS[3:], "new", "newer"]
    with_tokens(folder, WORDS, a)
    made = plan(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        task = by_name(made)[name]
        assert task.shape == (10, 8)
        ref = task.sources[0]
        assert ref.rows.tolist() == [1, 0, -1, 2, 3, 4, 5, 6, 7, 8]
        assert ref.fallback == task.base
        assert task.sources[1].rows is None
    assert by_name(made)["model.norm.weight"].sources[0].rows is None
    assert "1 tokens are not in it" in made.warnings[0]
    assert "config.json" in made.files_to_copy


def test_padding_goes_by_place_where_tokenizers_agree(folder):
    disk.write(folder / "base", seed=0, vocab=12, tokens=WORDS)
    disk.write(folder / "a", seed=1, vocab=10, tokens=WORDS)
    disk.write(folder / "b", seed=1, vocab=16, tokens=WORDS)
    task = by_name(plan(folder))["lm_head.weight"]
    assert task.sources[0].rows.tolist() == [*range(10), -1, -1]
    assert task.sources[1].rows.tolist() == [*range(12)]
    assert task.shape == (12, 8)


def test_sizes_that_nothing_explains(folder):
    disk.write(folder / "a", seed=1, vocab=12)
    assert "its vocabulary has 12 rows, that of base 10" in problems(folder)
    task = by_name(plan(folder, TIES + "allow_vocabulary: base\n"))["lm_head.weight"]
    assert task.sources[0].rows.tolist() == [*range(10)]


def test_the_tokenizer_of_another_model(folder):
    with_tokens(folder, WORDS, [*WORDS[:9], "new", "newer"])
    made = plan(folder, TIES + "tokenizer_source: a\n")
    task = by_name(made)["model.embed_tokens.weight"]
    assert task.shape == (11, 8)
    assert task.base.rows.tolist() == [*range(9), -1, -1]
    assert (task.base.fallback.model, task.base.fallback.rows) == ("a", None)
    assert task.sources[0].rows is None
    assert task.sources[1].fallback.model == "base"
    assert made.config["vocab_size"] == 11
    assert made.files_to_copy["tokenizer.json"] == folder / "a" / "tokenizer.json"


def test_the_union_of_added_tokens(folder):
    for name, added in (("base", ["<s>"]), ("a", ["<s>", "<a>"]), ("b", ["<b>", "<s>"])):
        disk.write(folder / name, vocab=10 + len(added))
        disk.write_tokenizer(folder / name, WORDS, added)
    made = plan(folder, TIES + "tokenizer_source: union\n")
    task = by_name(made)["model.embed_tokens.weight"]
    assert task.shape == (13, 8)  # 10 words, <s>, <a>, <b>
    assert task.base.rows.tolist() == [*range(11), -1, -1]
    assert [ref.rows.tolist()[10:] for ref in task.sources] == [[10, 11, -1], [11, -1, 10]]
    chain, ref = [], task.base
    while ref is not None:
        chain.append((ref.model, ref.rows.tolist()[11:]))
        ref = ref.fallback
    assert chain == [("base", [-1, -1]), ("a", [11, -1]), ("b", [-1, 10])]
    written = json.loads(made.files_to_write["tokenizer.json"])
    assert [(t["content"], t["id"]) for t in written["added_tokens"]] == [
        ("<s>", 10), ("<a>", 11), ("<b>", 12),
    ]  # fmt: skip
    assert "tokenizer.json" not in made.files_to_copy
    assert made.config["vocab_size"] == 13


def test_no_union_of_vocabularies_proper(folder):
    with_tokens(folder, WORDS, [*WORDS, "x"])
    text = problems(folder, TIES + "tokenizer_source: union\n")
    assert "belong to another vocabulary (the first: 'x')" in text


def test_a_damaged_tokenizer_is_named(folder):
    with_tokens(folder, WORDS, [*WORDS, "x"])
    (folder / "a" / "tokenizer.json").write_text("{")
    assert "tokenizer.json is no valid JSON" in problems(folder)


def test_rows_of_words_beyond_the_table_are_missing():
    """A tokenizer may have more tokens than its embedding has rows, and fewer."""
    target = Vocabulary(Path(), {"x": 0, "y": 1, "z": 2})
    own = Vocabulary(Path(), {"y": 0, "x": 1, "z": 3})
    assert rows_for(target, own, 3, 3).tolist() == [1, 0, -1]
    assert rows_for(target, own, 5, 4).tolist() == [1, 0, 3, -1, -1]
    # Padding of tables of one length stays where it is.
    assert rows_for(target, own, 5, 5).tolist() == [1, 0, 3, 3, 4]
    assert rows_for(target, target, 5, 5) is None
    assert rows_by_place(3, 3) is None


def test_other_forms_of_tokenizers(tmp_path):
    assert read_vocabulary(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("[PAD]\nword\n")
    assert read_vocabulary(tmp_path).ids == {"[PAD]": 0, "word": 1}
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "added_tokens.json").write_text('{"<c>": 2}')
    assert read_vocabulary(tmp_path).ids == {"a": 0, "b": 1, "<c>": 2}
    unigram = {"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}, "added_tokens": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert read_vocabulary(tmp_path).ids == {"<unk>": 0, "a": 1}


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": {"a": true}}}',
     '{"model": {"vocab": {}}, "added_tokens": [{"content": 3, "id": 0}]}', "[" * 9000],
)  # fmt: skip
def test_damaged_tokenizers(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(VocabularyError, match="token"):
        read_vocabulary(tmp_path)
