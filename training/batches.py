"""Batches for supervised fine-tuning: examples as a dataset in TRL's own form, and rows of it as tensors, encoded as in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from promptloop_pipeline.chat import Conversation
from promptloop_pipeline.chat.text import THINK

from .examples import TAKEN, Example, Tally

NO_LABEL = -100  # what cross entropy leaves out


def to_dataset(examples: Sequence[Example]) -> datasets.Dataset:
    """TRL's own form: prompt, completion, and images, as PNG, where any are shown. A text to be continued has no images."""
    if all(isinstance(e.asked, str) for e in examples):
        return datasets.Dataset.from_list([{"prompt": e.asked, "completion": e.answer} for e in examples])
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    messages = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    features = {"prompt": messages, "completion": messages}
    rows: list[dict[str, Any]] = []
    for e in examples:
        asked = [m | {"content": [{"type": p["type"], "text": p.get("text")} for p in m["content"]]} for m in _messages(e)]
        said = [{"role": "assistant", "content": [{"type": "text", "text": e.answer}]}]
        rows.append({"prompt": asked, "completion": said, "images": e.pictures})
    if any(e.pictures for e in examples):
        features["images"] = datasets.List(datasets.Image())
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _messages(e: Example) -> list[dict[str, Any]]:
    return [m for m in e.asked if isinstance(m, dict)]


def conversation_of(row: dict[str, Any]) -> Conversation:
    """Of a row of the dataset: what was asked, its pictures in their places."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    pictures = iter(row.get("images") or ())
    return [
        m
        | {
            "content": [
                {"type": "image", "image": next(pictures)} if p["type"] == "image" else {"type": "text", "text": p["text"]}
                for p in m["content"]
            ]
        }
        for m in row["prompt"]
    ]


class Collator:
    """Rows of the dataset as one batch, padded on the right; labels are the answer and the token that ends a turn.

    What is asked is encoded by the chat model, as in use. Rows with a picture and rows without go into one batch: what belongs to
    pictures is laid one after the other, and models put it where the rows have places for it.
    """

    def __init__(self, chat: Any) -> None:
        self.chat, self.end = chat, _end_of_turn(chat)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        asked = [conversation_of(row) for row in rows]
        tokens: list[dict[str, Tensor]] = [{} for _ in rows]
        batch: dict[str, Tensor] = {}
        for pictured in (True, False):
            part = [k for k, row in enumerate(rows) if bool(row.get("images")) is pictured]
            if not part:
                continue
            inputs = {name: value.cpu() for name, value in self.chat._inputs([asked[k] for k in part]).items()}
            there = inputs.pop("attention_mask").bool()
            for name, value in inputs.items():
                if value.shape != there.shape:
                    batch[name] = value  # of pictures
                    continue
                for k, of, mask in zip(part, value, there, strict=True):
                    tokens[k][name] = of[mask]
        for row, of in zip(rows, tokens, strict=True):
            said = torch.tensor([*self.spoken(_text(row), self.chat.tokenizer.decode(of["input_ids"][-16:])), self.end])
            labels = torch.cat([torch.full_like(of["input_ids"], NO_LABEL), said])
            of |= {name: torch.cat([value, said if name == "input_ids" else 0 * said]) for name, value in of.items()}
            of |= {"labels": labels, "attention_mask": torch.ones_like(labels)}
        fill = {"input_ids": self.chat.tokenizer.pad_token_id, "labels": NO_LABEL}
        for name in {name: None for of in tokens for name in of}:
            values = [of.get(name, torch.zeros_like(of["labels"])) for of in tokens]
            batch[name] = pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
        return batch

    def spoken(self, answer: str, before: str = "") -> list[int]:
        """The tokens of an answer, without its end; without its <think> where the chat template has just opened one."""
        *_, last = [None, *THINK.finditer(before)]
        if last and not last[1] and not before[last.end() :].strip() and (own := THINK.match(answer)):
            answer = answer[own.end() :]
        return self.chat.tokenizer(self.chat._plain(answer), add_special_tokens=False)["input_ids"]


def _text(row: Mapping[str, Any]) -> str:
    if isinstance(row["completion"], str):  # continues the prompt
        return row["completion"] if row["prompt"][-1:].isspace() else f" {row['completion']}"
    return row["completion"][0]["content"][0]["text"]


def _end_of_turn(chat: Any) -> int:
    """The first token after an answer that ends one, as the chat template has it; the tokenizer's own end where it has none."""
    found: list[int] = []
    if getattr(chat.processor, "chat_template", None) is not None:
        said = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
        said = said if chat.sees else [{"role": m["role"], "content": "x"} for m in said]
        text = chat.processor.apply_chat_template(said, tokenize=False, **chat.template_kwargs)
        after = chat.tokenizer(text[text.rindex("x") + 1 :], add_special_tokens=False)["input_ids"]
        found = [token for token in after if token in chat._ends()]
    return found[0] if found else chat.tokenizer.eos_token_id


def trainable(examples: Sequence[Example], collator: Collator, tally: Tally, max_length: int | None = None) -> list[Example]:
    """Without those whose answer has words that the model has no token for, and those that are longer than `max_length` tokens."""
    unknown, left = collator.chat.tokenizer.unk_token_id, []
    for e in examples:
        why = "words that the model has no token for" if unknown in collator.spoken(e.answer) else None
        if why is None and max_length is not None and collator(list(to_dataset([e])))["labels"].shape[1] > max_length:
            why = "longer than max_length"
        if why is None:
            left.append(e)
        else:
            tally[e.folder].update({TAKEN: -1, why: 1})
    return left
