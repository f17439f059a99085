"""Problems: the generator, files and their columns, prompts, order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.data import PromptSource, build_prompts, load_rows, load_tokenizer
from hybrid_rl.data.arithmetic import problems

GSM8K = [
    {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"question": "A thousand and a bit?", "answer": "#### a false mark\n#### 1,234"},
]


def test_arithmetic_sides_are_disjoint_even_mirrored():
    train, held_out = list(problems("train")), list(problems("eval"))
    assert len(held_out) >= 1000
    assert len(train) >= 6000
    sides = [{frozenset(row["prompt"][:-1].split("+")) for row in rows} for rows in (train, held_out)]
    assert not sides[0] & sides[1]
    assert train == list(problems("train")), "the split does not depend on anything"
    for row in train[:100] + held_out[:100]:
        a, b = row["prompt"][:-1].split("+")
        assert row["answer"] == str(int(a) + int(b))
        assert len(a) == len(b) == 2


def test_arithmetic_has_halves_and_subtraction():
    halves = [load_rows(f"arithmetic@{split}", setting="data.eval", columns={}) for split in ("validation", "test")]
    prompts = [{row["prompt"] for row in rows} for rows in halves]
    assert prompts[0] | prompts[1] == {row["prompt"] for row in problems("eval")}
    assert not prompts[0] & prompts[1]
    subtraction = load_rows("arithmetic:subtraction@train", setting="data.train", columns={})
    for row in subtraction[:100]:
        a, b = map(int, row["prompt"][:-1].split("-"))
        assert row["answer"] == row["slip"] == str(a - b)
        assert a >= b
    held_out = {frozenset(row["prompt"][:-1].split("+")) for row in problems("eval")}
    assert not held_out & {frozenset(row["prompt"][:-1].split("-")) for row in subtraction}
    both = load_rows("arithmetic:both@train", setting="data.train", columns={})
    assert both == [*problems("train"), *subtraction]


def test_stories_tell_the_problems_of_their_split():
    adding, taking = ("gets", "others", "in all"), ("loses", "sold", "too many")
    for split in ("train", "validation", "test"):
        rows = load_rows(f"arithmetic:words@{split}", setting="data.train", columns={})
        assert rows == load_rows(f"arithmetic:words@{split}", setting="data.train", columns={})
        found = []
        for row in rows:
            a, b = map(int, re.findall(r"\d+", row["prompt"]))
            sums = any(word in row["prompt"] for word in adding)
            assert sums != any(word in row["prompt"] for word in taking)
            assert int(row["answer"]) == (a + b if sums else a - b)
            found.append(f"{a}{'+' if sums else '-'}{b}=")
        assert sorted(found) == sorted(row["prompt"] for row in problems(split, "both"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_files_with_mapped_columns(tmp_path: Path, suffix: str):
    import pandas

    path = tmp_path / f"gsm8k{suffix}"
    frame = pandas.DataFrame(GSM8K)
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    rows = load_rows(str(path), setting="data.train", columns={"prompt": "question"}, answer_after="####")
    assert [(r["prompt"], r["answer"]) for r in rows] == [("Two and two?", "4"), ("A thousand and a bit?", "1234")]
    assert rows[0]["question"] == "Two and two?", "other columns stay"


@pytest.mark.parametrize(
    ("source", "options", "parts"),
    [
        ("nowhere.jsonl", {}, ["data.train='nowhere.jsonl'", "does not exist"]),
        ("empty.jsonl", {}, ["has no rows"]),
        ("gsm8k.jsonl", {}, ["no column 'prompt'", "question", "data.columns.prompt"]),
        ("gsm8k.jsonl", {"columns": {"prompt": "question", "answer": "solution"}}, ["no column 'solution'"]),
        ("broken.jsonl", {}, ["cannot be loaded"]),
        ("gsm8k.jsonl", {"columns": {"prompt": "question"}, "answer_after": "=>"}, ["row 0", "data.answer_after"]),
        ("arithmetic@trial", {}, ["'train', 'eval', 'validation' and 'test'"]),
        ("arithmetic:division@test", {}, ["data.train='arithmetic:division@test'", "'both' and 'words'"]),
        ("a b", {}, ["neither"]),
    ],
)
def test_bad_sources_are_refused(tmp_path: Path, monkeypatch, source: str, options: dict, parts: list[str]):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    Path("broken.jsonl").write_text("{not json\n")
    Path("gsm8k.jsonl").write_text("\n".join(map(json.dumps, GSM8K)))
    with pytest.raises(ConfigError) as caught:
        load_rows(source, setting="data.train", **{"columns": {}, **options})
    for part in parts:
        assert part in str(caught.value)


def test_prompts_are_templated_and_overlong_ones_counted(tiny_config: Config):
    tokenizer = load_tokenizer(tiny_config)
    settings = tiny_config.data.model_copy(update={"template": "Q {prompt} {braces}", "max_prompt_length": 16})
    prompts, left_out = build_prompts(
        [{"prompt": "1+1="}, {"prompt": "x" * 99}], settings, tokenizer, setting="data.train"
    )
    assert [p.text for p in prompts] == ["Q 1+1= {braces}"]
    assert left_out == 1
    assert tokenizer.decode(prompts[0].token_ids) == prompts[0].text
    with pytest.raises(ConfigError, match=r"data\.max_prompt_length=16"):
        build_prompts([{"prompt": "x" * 99}], settings, tokenizer, setting="data.train")


def test_a_chat_template_is_needed_for_chat(tiny_tree: dict):
    tiny_tree["data"]["chat"] = True
    with pytest.raises(ConfigError, match="chat template"):
        load_tokenizer(parse_config(tiny_tree))


def test_the_order_is_seeded_covers_each_epoch_and_resumes(tiny_config: Config):
    rows = [{"prompt": str(i)} for i in range(10)]
    prompts, _ = build_prompts(rows, tiny_config.data, load_tokenizer(tiny_config), setting="data.train")
    source = PromptSource(prompts, seed=3)
    taken = [p.id for _ in range(7) for p in source.take(4)]
    epochs = [sorted(i.split("/")[1] for i in taken[e * 10 : e * 10 + 10]) for e in range(2)]
    assert epochs[0] == epochs[1] == sorted(map(str, range(10)))
    assert [i.split("/")[1] for i in taken[:10]] != [i.split("/")[1] for i in taken[10:20]]
    resumed = PromptSource(prompts, seed=3, position=12)
    assert [p.id for p in resumed.take(16)] == taken[12:]
    assert [p.id for p in PromptSource(prompts, seed=4).take(28)] != taken
