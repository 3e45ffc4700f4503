"""Dataset names: ours everywhere, the user's own first, and a helpful sentence for a file that is not here."""

import json

import pytest
from llamafactory.data.parser import get_dataset_list

from lmtp_factory import resources
from lmtp_factory.distill.rows import is_self_distilled, parse_ids
from lmtp_factory.errors import LMTPError
from lmtp_factory.plugin.dataset_names import dataset_info, find_datasets


RELEASE = ["mixed_Q25_3B", "mixed_Q25_7B", "mixed_L32_3B", "mixed_L31_8B", "mixed_G3_4b", "mixed_G3_12b", "mixed_10K"]
DEMO = ["self_distilled_smollm2_train", "self_distilled_smollm2_heldout"]


@pytest.fixture
def user_dir(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    return tmp_path


def find(names, dataset_dir):
    return find_datasets(names, str(dataset_dir), get_dataset_list)


def test_every_promised_name_is_known():
    assert set(dataset_info()) == {*RELEASE, *DEMO}


@pytest.mark.parametrize("name", DEMO)
def test_shipped_data_needs_no_dataset_dir(name, tmp_path):
    (attr,) = find([name], tmp_path / "nowhere")
    assert attr.load_from == "file"
    assert attr.dataset_name == str(resources.folder("datasets") / f"{name}.jsonl")
    assert is_self_distilled(attr)


def test_own_and_shipped_names_mix_in_order(user_dir):
    attrs = find([DEMO[0], "mine", DEMO[1]], user_dir)
    assert [attr.dataset_name.rpartition("/")[2] for attr in attrs] == [
        f"{DEMO[0]}.jsonl",
        "mine.json",
        f"{DEMO[1]}.jsonl",
    ]


def test_the_users_entry_wins(user_dir):
    (user_dir / "dataset_info.json").write_text(json.dumps({"mixed_10K": {"file_name": "other.json"}}))
    (attr,) = find(["mixed_10K"], user_dir)
    assert attr.dataset_name == "other.json"


@pytest.mark.parametrize("name", RELEASE)
def test_a_release_file_that_is_not_here_says_how_to_get_it(name, user_dir):
    with pytest.raises(LMTPError) as error:
        find([name], user_dir)
    sentence = str(error.value)
    assert "hf download xiao-hao/self-distillation-LLMs" in sentence
    assert dataset_info()[name]["file_name"] in sentence
    assert "lmtp-cli distill" in sentence


@pytest.mark.parametrize("where", ["dataset_dir", "variable"])
def test_a_downloaded_release_file_is_found(where, tmp_path, monkeypatch):
    file = tmp_path / dataset_info()["mixed_L31_8B"]["file_name"]
    file.write_text("[]")
    if where == "variable":
        monkeypatch.setenv("LMTP_DATA_DIR", str(tmp_path))
    (attr,) = find(["mixed_L31_8B"], tmp_path if where == "dataset_dir" else "nowhere")
    assert attr.dataset_name == str(file)


def test_unknown_names_get_upstreams_error(user_dir):
    with pytest.raises(ValueError, match="Undefined dataset neither") as error:
        find([DEMO[0], "neither"], user_dir)
    assert not isinstance(error.value, LMTPError)


def test_a_broken_dataset_info_of_the_users_is_not_passed_over(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="Cannot open"):
        find([DEMO[0]], tmp_path)


def test_online_names_stay_hub_datasets():
    (attr,) = find(["mixed_10K"], "ONLINE")
    assert (attr.load_from, attr.dataset_name) == ("hf_hub", "mixed_10K")


def test_a_dict_of_entries():
    attrs = find_datasets(["hub", DEMO[0]], {"hub": {"hf_hub_url": "a/b"}}, get_dataset_list)
    assert [attr.load_from for attr in attrs] == ["hf_hub", "file"]


@pytest.mark.parametrize("names", [None, []])
def test_no_names(names, tmp_path):
    assert find_datasets(names, str(tmp_path), get_dataset_list) == []


def test_shipped_rows_are_sound():
    prompts = {}
    for name in DEMO:
        lines = (resources.folder("datasets") / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) >= 50
        prompts[name] = {row["instruction"] for row in rows}
        assert len(prompts[name]) == len(rows)
        for row in rows:
            ids = parse_ids(row["output_ids"])
            assert max(parse_ids(row["prompt_ids"]) + ids) < 49152
            assert (ids[-1] == 2) == (row["finish_reason"] == "stop")
    assert not prompts[DEMO[0]] & prompts[DEMO[1]]
