"""An engine that answers from a script, for what does not depend on a model."""

from lmtp_factory.distill.engine import Generation, cut_at_stop


ANSWER = "That is a good question, and here is what I think of it."


class ScriptedEngine:
    """Writes `write_prompt(id)` after the start of a user turn, and `ANSWER` after a question."""

    def __init__(self, tokenizer, write_prompt=None):
        self.tokenizer, self.write_prompt = tokenizer, write_prompt
        self.asked = []

    def facts(self):
        return {}

    def generate(self, requests, sampling, *, done, on_finished):
        for request in requests:
            if request.id in done:
                continue
            self.asked.append(request)
            as_user = self.tokenizer.decode(request.prompt_ids).endswith("user\n")
            text = self.write_prompt(request.id) if as_user else f"{ANSWER}<|im_end|>"
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: sampling.max_new_tokens]
            on_finished([Generation(request.id, *cut_at_stop(ids, sampling.stop_ids[:1]))])
