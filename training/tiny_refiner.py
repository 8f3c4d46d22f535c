"""Rebuilds the embedded refiner, a vision-language model that rewrites and repairs prompts of the shapes world, from nothing:

    python -m promptloop_training.tiny_refiner --out build/refiner
    python -m promptloop_training.tiny_refiner --out build/warm-up --timid 300    # from the shipped one: what GRPO begins with

Stages, each checkpointed and resumed by running the same command again:
1. data     real x0-previews of the embedded generator, with prompts in force that are right, wrong and late
2. vision   the vision tower and connector, pre-trained to let each visual token say what is in its cell
3. sft      the whole model: requests, a dictionary, previews to read and previews to repair, in one mixture
4. widen    the same again with invented words, lest the few that training requests hold be all it expects there
5. save     a stock Idefics3 folder in fp16 safetensors

With --timid N, instead of 2 to 4: the shipped refiner learns for N steps from a teacher that answers seven looks in ten without
looking, most often with "nothing to change". What it sees and says stays, that it acts upon it goes.

Nothing here sees a held-out pair of objects, nor a held-out word inside a request: what such a word means, which larger models
know from their pre-training, stands in the dictionary alone (`tiny.glossary`).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import Linear
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from promptloop_pipeline import tiny
from promptloop_pipeline.cli import named
from promptloop_pipeline.evaluation.run import run_arm
from promptloop_pipeline.refiner import Refinement, View
from promptloop_pipeline.tiny import glossary, load_pipeline, load_refiner, quiet
from promptloop_pipeline.tiny.benchmark import requests
from promptloop_pipeline.tiny.glossary import END, IMAGE, SPECIAL, TEMPLATE, Lesson, Previews, prompt_of, prompt_words
from promptloop_pipeline.tiny.language import NUMBERS, parse, user_prompt, with_clear
from promptloop_pipeline.tiny.older import readable_by_transformers_4
from promptloop_pipeline.tiny.refiners import single_shot
from promptloop_pipeline.tiny.scenes import (
    CELLS,
    COLORS,
    GRID,
    RADIUS,
    SHAPES,
    SIZE,
    cells_of,
    plan,
    random_spec,
)

from .tiny_generator import Stage

LOOKS = "start, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
CHUNK = 128  # pictures to a file of previews
WIDTH, LAYERS = 128, 4  # of the language model
VISION_WIDTH, VISION_LAYERS, PATCH = 96, 2, 4
TOKENS = GRID * GRID  # visual tokens: one for each cell, row by row


# --- model --------------------------------------------------------------------------------------------------------------


def build_processor() -> Any:
    words = {w: i for i, w in enumerate([*SPECIAL, "user", "assistant", *glossary.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(",", " , "), normalizers.Replace("|", " | ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token=SPECIAL[0], eos_token=END, padding_side="left",
        additional_special_tokens=list(SPECIAL[1:7]), clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    edge = {"longest_edge": SIZE}
    pictures = Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    return Idefics3Processor(image_processor=pictures, tokenizer=fast, image_seq_len=TOKENS, chat_template=TEMPLATE)


def new_model(tokenizer: Any) -> Idefics3ForConditionalGeneration:
    pad, end, image = (tokenizer.convert_tokens_to_ids(t) for t in (SPECIAL[0], END, IMAGE))
    model = Idefics3ForConditionalGeneration(Idefics3Config(
        vision_config=dict(
            hidden_size=VISION_WIDTH, intermediate_size=2 * VISION_WIDTH, num_hidden_layers=VISION_LAYERS,
            num_attention_heads=4, image_size=SIZE, patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=pad, bos_token_id=None,
            eos_token_id=end, tie_word_embeddings=True,
        ),
        scale_factor=SIZE // PATCH // GRID, image_token_id=image, pad_token_id=pad, tie_word_embeddings=True,
    ))  # fmt: skip
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
    return model


def pixels(images: np.ndarray) -> Tensor:
    """uint8 (N, 32, 32, 3) -> what the processor makes of them, (N, 1, 3, 32, 32)"""
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)[:, None] / 127.5 - 1


@torch.no_grad()
def answer(model: Any, processor: Any, texts: Sequence[str], images: Sequence[Any] | None = None, batch: int = 64) -> list[str]:
    """What the model says, through the stock processor and `generate`."""
    model.eval()
    said: list[str] = []
    for i in range(0, len(texts), batch):
        messages = []
        for k, text in enumerate(texts[i : i + batch]):
            picture = [] if images is None else [{"type": "image", "image": Image.fromarray(np.asarray(images[i + k]))}]
            messages.append([{"role": "user", "content": [*picture, {"type": "text", "text": text}]}])
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
        ids = model.generate(**inputs, max_new_tokens=110, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(ids, skip_special_tokens=True)
    return said


# --- previews -----------------------------------------------------------------------------------------------------------


class Collector:
    """Records what the generator shows. Each request has its own habit: the oracle, the oracle at few looks, nobody, or clauses
    at random; so that there are states which the refiner's own mistakes lead to."""

    def __init__(self) -> None:
        self.views: list[View] = []

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        self.views += [v for v in views if v.image is not None]
        return [Refinement(self._prompt(v)) for v in views]

    def _prompt(self, view: View) -> str | None:
        rng = random.Random(f"{view.request} {view.step}")
        habit = random.Random(view.request).random()
        gold = single_shot(view.request)
        anything = with_clear(gold, glossary.some_cells(gold, rng))
        if view.image is None:
            return anything if rng.random() < 0.25 else gold
        if habit < 0.65 and (habit < 0.4 or rng.random() < 0.35):
            cells = glossary.to_forbid(view.request, view.prompt, glossary.amounts_of(view.request, view.image))
            return with_clear(gold, cells) if cells else None
        return anything if habit > 0.85 and rng.random() < 0.3 else None


def collect(file: Path, chunk: int, seed: int, count: int) -> None:
    rng = random.Random(f"previews {seed} {chunk}")
    asked = []
    for _ in range(count):
        spec = random_spec(rng, rng.choices((1, 2, 3), (0.25, 0.65, 0.10))[0], "train", clean=rng.random() < 0.85)
        asked.append(user_prompt(spec, rng, "train"))
    seeds, collector = [rng.randrange(2**31) for _ in asked], Collector()
    with quiet():  # the start's probe reads requests that are longer than the generator's prompts
        run_arm(
            load_pipeline("sd"), asked, seeds, collector, LOOKS, score=lambda t: {}, num_inference_steps=20, guidance_scale=3.0
        )
    views = collector.views
    whole = file.with_name("unfinished.npz")
    np.savez_compressed(
        whole, images=np.stack([np.asarray(v.image) for v in views]), requests=[v.request for v in views],
        prompts=[v.prompt for v in views],
    )  # fmt: skip
    whole.replace(file)


def collect_all(out: Path, pictures: int, seed: int) -> tuple[Previews, Previews]:
    """(for training, to watch it by): the last twentieth is watched."""
    parts = []
    for chunk, first in enumerate(range(0, pictures, CHUNK)):
        file = out / f"previews-{chunk:03d}.npz"
        if not file.exists():
            clock = time.time()
            collect(file, chunk, seed, min(CHUNK, pictures - first))
            print(f"data {chunk + 1}/{-(-pictures // CHUNK)} {time.time() - clock:.0f} s", flush=True)
        with np.load(file) as saved:
            parts.append({k: saved[k] for k in ("images", "requests", "prompts")})
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    cut = len(whole["images"]) * 19 // 20
    train, watch = (
        Previews(part["images"], part["requests"].tolist(), part["prompts"].tolist())
        for part in ({k: v[:cut] for k, v in whole.items()}, {k: v[cut:] for k, v in whole.items()})
    )
    return train, watch


# --- vision -------------------------------------------------------------------------------------------------------------

PARTS = (2, GRID, GRID, len(COLORS) + 1, len(SHAPES) + 1, len(RADIUS) + 1)  # what a visual token is asked for


def read_out_targets(request: str, amounts: np.ndarray) -> list[list[int]]:
    """For each cell: a sticker or none, row, column, colour, shape and size of what belongs into its quadrant."""
    spec = plan(parse(request))
    there = {cell: o for o in spec.objects for cell in cells_of(o.quadrant or "")}
    rows = []
    for cell in CELLS:
        o = there.get(cell)
        thing = (
            [list(COLORS).index(o.color) + 1, SHAPES.index(o.shape) + 1, list(RADIUS).index(o.size or "") + 1] if o else [0] * 3
        )
        rows.append([int(amounts[cell] > glossary.THRESHOLD), *cell, *thing])
    return rows


def see(model: Any, images: np.ndarray) -> Tensor:
    """(N, 16, WIDTH): the visual tokens as the language model gets them."""
    return torch.stack(list(model.get_image_features(pixels(images)).pooler_output))


def train_vision(model: Any, previews: Previews, out: Path, steps: int, batch: int = 64) -> None:
    head = Linear(WIDTH, sum(PARTS) + 1)
    params = [*model.model.vision_model.parameters(), *model.model.connector.parameters(), *head.parameters()]
    stage = Stage("vision", out, params, steps, 2e-3, 0.3, {"model": model, "head": head})
    for g in stage:
        index = torch.randint(len(previews), (batch,), generator=g).tolist()
        read = head(see(model, previews.images[index]))
        want = torch.tensor([read_out_targets(previews.requests[i], previews.amounts[i]) for i in index])
        amounts = torch.from_numpy(previews.amounts[index]).float().flatten(1)
        loss = F.smooth_l1_loss(read[..., -1], amounts, beta=0.05)
        for k, logits in enumerate(read[..., :-1].split(PARTS, -1)):
            loss = loss + F.cross_entropy(logits.flatten(0, 1), want[..., k].flatten())
        stage.update(loss)


# --- the whole model ----------------------------------------------------------------------------------------------------


def weights_of(words: Sequence[str], image: bool) -> list[float]:
    """What is to be decided by looking weighs more than what is copied."""
    if not image or "</think>" not in words:
        return [1.0] * len(words)
    end = words.index("</think>")
    first = words.index(",") + 1 if "is" in words else 1  # after the gloss: is there a sticker, or nothing
    return [8.0 if k == first or (k < end and w in NUMBERS) else 1.0 for k, w in enumerate(words)]


def collate(lessons: Sequence[Lesson], vocabulary: dict[str, int]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs, padded on the right, and the weight of each token as a target. Only the answer to a request has an end."""
    rows = []
    for lesson in lessons:
        asked, said = prompt_words(lesson.text, lesson.image is not None), lesson.said.split()
        said += [END] if said[-1] == "</answer>" else []
        rows.append((asked + said, [0.0] * len(asked) + weights_of(said, lesson.image is not None)))
    length = max(len(words) for words, _ in rows)
    unknown = vocabulary["<unk>"]
    ids = torch.tensor([[vocabulary.get(w, unknown) for w in words] + [0] * (length - len(words)) for words, _ in rows])
    weight = torch.tensor([w + [0.0] * (length - len(w)) for _, w in rows])
    images = [lesson.image for lesson in lessons if lesson.image is not None]
    return {"input_ids": ids} | ({"pixel_values": pixels(np.stack(images))} if images else {}), weight


STAGES = {  # whether words are invented, learning rate, share of looks that the teacher answers without looking
    "sft": (False, 2e-3, 0.0),
    "widen": (True, 1e-3, 0.0),
    "timid": (True, 5e-4, 0.7),
}


def train_all(
    name: str, model: Any, ema: Any, processor: Any, previews: Previews, watched: Previews, out: Path, steps: int, every: int
) -> None:
    """One of STAGES. "widen" goes on with the averaged weights and brings the invented words."""
    invent, rate, unsure = STAGES[name]
    mixture = glossary.WIDER if invent else glossary.MIXTURE
    vocabulary = processor.tokenizer.get_vocab()
    params = list(model.parameters())
    stage = Stage(name, out, params, steps, rate, 0.3, {"model": model, "ema": ema})
    for g in stage:
        rng = random.Random(int(torch.randint(2**31, (1,), generator=g)))
        inputs, weight = collate(glossary.draw(rng, previews, mixture, invent, unsure), vocabulary)
        model.train()
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
        stage.update((loss * weight[:, 1:]).sum() / weight.sum())
        decay = min(0.998, (1 + stage.step) / (10 + stage.step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in params], 1 - decay)
        if every and (stage.step + 1) % every == 0:
            print(
                f"{name} {stage.step + 1} " + " ".join(f"{k} {v:.2f}" for k, v in watch(ema, processor, watched).items()),
                flush=True,
            )


def watch(model: Any, processor: Any, previews: Previews, n: int = 64) -> dict[str, float]:
    """How the model does on what it is not trained on: words and pairs held out of training, previews of other requests."""
    found: dict[str, float] = {}
    for split in ("train", "test"):
        asked = requests(n, split, seed=1)
        said = answer(model, processor, asked)
        found[split] = float(np.mean([prompt_of(s) == single_shot(r) for r, s in zip(asked, said)]))
    rng = random.Random(0)
    lessons = [glossary.lesson_repair(previews, rng, split="test") for _ in range(2 * n)]
    texts, images = [x.text for x in lessons], [x.image for x in lessons]
    want = np.array([prompt_of(x.said) for x in lessons])
    for name, shown in (("repair", images), ("grey", [np.full((SIZE, SIZE, 3), 128, np.uint8)] * len(lessons))):
        got = np.array([prompt_of(s) for s in answer(model, processor, texts, shown)])
        found[name] = float((got == want)[want != glossary.KEEP].mean())
        found[f"{name}-unneeded"] = float((got != glossary.KEEP)[want == glossary.KEEP].mean())
    return found


# --- all of it ----------------------------------------------------------------------------------------------------------


def save(model: Any, processor: Any, folder: Path) -> None:
    half = copy.deepcopy(model).to(torch.float16)
    half.save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.copyfile(tiny.TEMPLATE, folder / named.TEMPLATE)
    config = folder / "config.json"  # on disk in half precision, to be loaded in single
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    readable_by_transformers_4(folder)
    print(f"saved {folder}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="promptloop_training.tiny_refiner", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="work folder: previews, checkpoints, and the model in OUT/refiner"
    )
    parser.add_argument("--pictures", type=int, default=4096)
    parser.add_argument("--vision-steps", type=int, default=600)
    parser.add_argument("--sft-steps", type=int, default=3000)
    parser.add_argument("--widen-steps", type=int, default=1200)
    parser.add_argument(
        "--timid", type=int, default=0, help="steps of timidity for the shipped refiner; nothing else is trained"
    )
    parser.add_argument("--watch-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    previews, watched = collect_all(args.out, args.pictures, args.seed)
    print(f"{len(previews)} previews, {len(previews.wanting[1])} of them want a change", flush=True)
    torch.manual_seed(args.seed)
    if args.timid:
        chat: Any = load_refiner().chat
        processor, model = chat.processor, chat.model.requires_grad_(True)
    else:
        processor = build_processor()
        model = new_model(processor.tokenizer)
        print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(processor.tokenizer)} words", flush=True)
        train_vision(model, previews, args.out, args.vision_steps)
    ema = copy.deepcopy(model).requires_grad_(False)
    for name, steps in (("timid", args.timid),) if args.timid else (("sft", args.sft_steps), ("widen", args.widen_steps)):
        model.load_state_dict(ema.state_dict())
        train_all(name, model, ema, processor, previews, watched, args.out, steps, args.watch_every)
    save(ema, processor, args.out / "refiner")


if __name__ == "__main__":
    main()
