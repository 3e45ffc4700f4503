"""Facts that decide a model's hidden states."""

from transformers import AutoConfig

from lmtp_factory.modeling import model_facts


def test_facts_of_a_hub_snapshot_are_those_of_the_files_it_links_to(llama, tmp_path):
    config = AutoConfig.from_pretrained(llama)
    for path in llama.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert model_facts.model_facts(str(tmp_path), config) == model_facts.model_facts(str(llama), config)
    assert list(model_facts.model_facts("org/name", config)) == ["configuration"]
    config._commit_hash = "abc"
    assert model_facts.model_facts("org/name", config)["commit"] == "abc"
