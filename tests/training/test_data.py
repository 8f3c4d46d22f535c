import json

import pytest
from PIL import Image
from promptloop_training.data import TAKEN, hold_out, load_prompts, to_dataset


def written(folder, rows, name="prompts.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_shapes_are_the_same_for_everybody_and_other_ones_for_another_seed():
    one, again, other = (load_prompts("shapes:train", n=32, seed=s) for s in (0, 0, 1))
    assert one.requests == again.requests and one.digest == again.digest
    assert other.digest != one.digest and not set(other.requests) & set(one.requests)
    assert load_prompts("shapes:train:2", n=8).requests != load_prompts("shapes:train:1", n=8).requests


def test_what_rewards_are_told_reaches_the_trainer_as_it_was_written(tmp_path):
    """Arrow would give every object of a list the keys of all others."""
    rows = [
        {"prompt": "two cats", "checks": [{"class": "cat", "count": 2}, {"class": "dog", "color": "red"}], "tag": "geneval"},
        {"prompt": "a cup", "checks": [], "extra": {"a": [1, [2.5, None]]}, "tag": "ocr"},
    ]
    prompts = load_prompts(str(written(tmp_path, rows)))
    data = to_dataset(prompts)
    assert len(data) == 2
    for i, row in enumerate(rows):
        got = data[i]
        assert got["prompt"] == [{"role": "user", "content": row["prompt"]}]
        assert got["request"] == row["prompt"] and got["row"] == i and got["tag"] == row["tag"]
        assert got["checks"] == row["checks"] and got["extra"] == row.get("extra")
    assert to_dataset(prompts, conversational=False)[1]["prompt"] == "a cup"
    assert prompts.tags() == {"geneval", "ocr"}


def test_a_part_is_told_what_is_its_own(tmp_path):
    prompts = load_prompts(str(written(tmp_path, [{"prompt": f"p{i}", "k": i} for i in range(10)])))
    part = prompts.take([7, 2]).take([1])
    assert part.requests == ["p2"] and part.told(0) == {"k": 2} and to_dataset(part)[0]["k"] == 2


def test_n_prompts_are_spread_evenly(tmp_path):
    file = written(tmp_path, [{"prompt": f"p{i}"} for i in range(10)])
    assert load_prompts(str(file), n=5).requests == ["p0", "p2", "p4", "p6", "p8"]
    with pytest.raises(ValueError, match="11 prompts are wanted, and .* has 10"):
        load_prompts(str(file), n=11)


def test_the_digest_is_of_contents_and_not_of_places(tmp_path):
    rows = [{"prompt": "a", "k": [1]}, {"prompt": "b", "k": [2]}]
    changed = [{"prompt": "a", "k": [1]}, {"prompt": "b", "k": [3]}]
    one, two, three = (
        load_prompts(str(written(tmp_path, r, n))).digest
        for r, n in ((rows, "1.jsonl"), (rows, "2.jsonl"), (changed, "3.jsonl"))
    )
    assert one == two != three


def test_held_out_prompts_are_never_trained_on(tmp_path):
    texts = [f"p{i % 12}" for i in range(20)]  # some twice
    file = tmp_path / "p.txt"
    file.write_text("\n".join(texts))
    rest, held = hold_out(load_prompts(str(file)), 4)
    assert held.requests == ["p0", "p5", "p10", "p3"]
    assert not set(rest.requests) & set(held.requests) and set(rest.requests) | set(held.requests) == set(texts)
    for n in (20, 21):
        with pytest.raises(ValueError, match=f"20 prompts, and {n} of them .* watch_prompts"):
            hold_out(load_prompts(str(file)), n)


def test_a_dataset_with_pictures_and_splits(tmp_path):
    import datasets

    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    data = datasets.Dataset.from_dict(
        {"caption": ["a", "b", "c"], "look": pictures, "image": pictures, "n": [[1], [2, 3], []]},
        features=datasets.Features(
            {
                "caption": datasets.Value("string"),
                "look": datasets.Image(),
                "image": datasets.Image(),
                "n": [datasets.Value("int64")],
            }
        ),
    )
    datasets.DatasetDict({"train": data, "small": data.select([2])}).save_to_disk(str(tmp_path / "d"))
    prompts = load_prompts(str(tmp_path / "d"), "caption")
    assert prompts.requests == ["a", "b", "c"] and prompts.left_out == ("image",)
    rows = to_dataset(prompts)
    assert [rows[i]["look"].getpixel((0, 0)) for i in range(3)] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert [rows[i]["n"] for i in range(3)] == [[1], [2, 3], []] and "image" not in rows[0]
    assert load_prompts(f"{tmp_path / 'd'}:small", "caption").requests == ["c"]
    with pytest.raises(ValueError, match=r"no column 'prompt'; there are caption, look, image, n"):
        load_prompts(str(tmp_path / "d"))
    with pytest.raises(ValueError, match="no split 'test'; there are train, small"):
        load_prompts(f"{tmp_path / 'd'}:test", "caption")
    (tmp_path / "e").mkdir()
    nothing = datasets.Features({"prompt": datasets.Value("string")})
    datasets.Dataset.from_dict({"prompt": []}, features=nothing).to_parquet(str(tmp_path / "e" / "train.parquet"))
    datasets.Dataset.from_dict({"prompt": ["a"]}).to_parquet(str(tmp_path / "e" / "test.parquet"))
    with pytest.raises((ValueError, OSError), match=r"holds no prompt|no data"):
        load_prompts(str(tmp_path / "e"))
    datasets.Dataset.from_dict({"prompt": ["a", None]}).save_to_disk(str(tmp_path / "f"))
    with pytest.raises(ValueError, match="row 1 has the prompt None"):
        load_prompts(str(tmp_path / "f"))


def test_what_cannot_be_read_says_what_can(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    for source, column, error, message in (
        ("shapes:tset", "prompt", ValueError, "shapes:train|any|test"),
        ("shapes:train:4", "prompt", ValueError, "with :1, :2 or :3"),
        (str(tmp_path / "no.jsonl"), "prompt", FileNotFoundError, "no file of prompts"),
        (str(tmp_path / "nowhere"), "prompt", FileNotFoundError, "no folder or file of prompts"),
        (str(empty), "prompt", ValueError, "holds no prompt"),
        (str(written(tmp_path, [{"text": "a", "k": 1}])), "prompt", ValueError, 'no column "prompt"; there are text, k'),
        (str(written(tmp_path, [{"prompt": "a"}, {"k": 1}], "2.jsonl")), "prompt", ValueError, "line 2"),
        (str(written(tmp_path, [{"prompt": "a"}], "3.jsonl")), "text", ValueError, "prompt_column is 'text'"),
        ("nobody/nothing-of-the-kind", "prompt", OSError, "cannot load the prompts"),
    ):
        with pytest.raises(error) as e:
            load_prompts(source, column)
        assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("key", sorted(TAKEN - {"refined", "format_ok", "trajectories", "name"}))
def test_keys_that_the_trainer_reads_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match=f"the key '{key}' is taken; rename it"):
        load_prompts(str(written(tmp_path, [{"prompt": "a", key: "x"}])))
