"""Rewards that ask a chat model several questions a picture: key-points, a list of yes-no checks, and win rates by pairs. What is
common to all rewards that ask, and what `model` and the options are: see judge.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..chat import Completion
from ..chat.text import clean, split_reasoning
from ..reward import Judgement
from .combine import win_rates
from .judge import FOLDER, Asking, answer_of, shown, unjudged
from .simple import needed

LONGEST = 500  # characters of a question; more is none
LINES = 2000  # of a plan; whoever wrote more has lost the thread
KEPT = 4096  # requests whose checks are remembered


@dataclass(frozen=True)
class Check:
    """A question about a picture, which is answered with yes where the request is met, and the key point that it belongs to."""

    question: str
    key_point: str = "other"


class KeyPoints(Asking):
    """Share of what was asked for that is in the picture, as yes-no checks, 0 to 1; an open stand-in for PromptEnhancer's
    AlignEvaluator (arXiv 2509.04545), which was never released: that is a fine-tuned Qwen2.5-VL-32B which rates 24 key points.

    First the model, shown no picture, breaks the request into at most `most` checks, each with one of the 24 key points of
    templates/key-points.txt or "other"; once for each request, also over calls. A benchmark can fix them with context `checks=`: for
    each picture a list of questions, of (key point, question), or of {"key_point", "question"}; None: the model's own. Then every check
    of every picture is judged, all in one call. Score: the mean over the checks that were answered.

    details: "checks", each with "key_point", "question", "verdict" (true, false, or null where no answer could be read, which is left
    out of the mean), "said" and maybe "error"; "judged" and "unread", how many. plan, check: the two templates, by name or path.
    Weights: the model's own licence.
    """

    def __init__(
        self, model: Any, *, name: str = "key-points", plan: str | Path = "key-points-plan", check: str | Path = "key-points-check",
        most: int = 16, **options: Any,
    ) -> None:  # fmt: skip
        if not isinstance(most, int) or most < 1:
            raise ValueError(f"most is {most!r}; use a whole number of checks, 1 or more")
        places = {plan: "request points most", check: "image question"}
        super().__init__(name, model, places, **{"max_new_tokens": 1024} | options)
        self.most, self.points = most, key_point_names()
        self._checks: dict[str, tuple[Check, ...]] = {}

    def judge(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[Judgement]:
        pictures, found = self._sort(images, prompts)
        given = needed(self.name, context, "checks", len(images)) if context.get("checks") is not None else [None] * len(images)
        fixed = {i: self._given(given[i]) for i in pictures if given[i] is not None}
        plans = self._plan([prompts[i] for i in pictures if i not in fixed])
        checks, failed = {}, {}
        for i in pictures:
            plan = fixed[i] if i in fixed else plans[prompts[i]]
            if isinstance(plan, str):
                failed[i] = unjudged(plan)
            elif not plan:
                failed[i] = unjudged("there are no checks")
            else:
                checks[i] = plan
        _, template = self.templates
        said = iter(
            self._ask([template.conversation(image=pictures[i], question=c.question) for i in checks for c in checks[i]])
        )
        asked = failed | {i: _judgement([(c, next(said)) for c in checks[i]]) for i in checks}
        self._warn([j.details["error"] for j in asked.values() if j.score is None], len(asked))
        found |= asked
        return [found[i] for i in range(len(images))]

    def _plan(self, requests: Sequence[str]) -> dict[str, tuple[Check, ...] | str]:
        """The checks of each request, or why there are none. A failure is not remembered: a server may be back next time."""
        template, _ = self.templates
        points = "\n".join(f"{name}: {meaning}" for name, meaning in self.points.items())
        plans: dict[str, tuple[Check, ...] | str] = {r: self._checks[r] for r in requests if r in self._checks}
        new = [r for r in dict.fromkeys(requests) if r not in plans]
        said = self._ask([template.conversation(request=r, points=points, most=str(self.most)) for r in new])
        for request, completion in zip(new, said, strict=True):
            checks = tuple(read_checks(completion.text, self.points)[: self.most])
            if checks and not completion.error:
                plans[request] = self._checks[request] = checks
            else:
                plans[request] = completion.error or f"no checks in the answer {shown(completion.text)[-200:]!r}"
        for request in list(self._checks)[:-KEPT]:
            self._checks.pop(request, None)
        return plans

    def _given(self, checks: Any) -> tuple[Check, ...]:
        found = [_check(c) for c in checks] if isinstance(checks, (list, tuple)) else [None]
        if None in found:
            raise ValueError(
                f"{self.name} cannot use the checks {checks!r:.200}; give for each picture a list of questions, or of (key point, "
                'question), or of {"key_point": ..., "question": ...}; None: the model makes them'
            )
        return tuple(c for c in found if c is not None)


def _judgement(answered: Sequence[tuple[Check, Completion]]) -> Judgement:
    checks: list[dict[str, Any]] = []
    for check, said in answered:
        verdict = None if said.error else read_verdict(said.text)
        error = {"error": said.error} if said.error else {}
        checks.append(
            {"key_point": check.key_point, "question": check.question, "verdict": verdict, "said": shown(said.text), **error}
        )
    verdicts = [c["verdict"] for c in checks if c["verdict"] is not None]
    details = {"checks": checks, "judged": len(verdicts), "unread": len(checks) - len(verdicts)}
    if not verdicts:
        return unjudged(checks[0].get("error") or f"no yes or no in the answer {checks[0]['said'][-200:]!r}", **details)
    return Judgement(sum(verdicts) / len(verdicts), details)


class Pairwise(Asking):
    """Which of two pictures of one request is better, and the win rates that follow from it, as in Pref-GRPO (arXiv 2508.20751).

    As a reward: the share of the others of its group that a picture beats, 0 to 1; None where there is no verdict on it. Groups:
    context `groups=`, any value for each picture; default: the pictures of one prompt. details: "beats", the verdict on each other
    picture, by its number. template: a name or path; it shows {first} {second} {request}. What the UnifiedReward models answer
    ("Image 1 is better") is read as well. Weights: the model's own licence.
    """

    def __init__(
        self, model: Any = None, *, name: str = "win-rate", template: str | Path = "pairwise", server_model: str | None = None,
        dtype: Any = None, device: str | None = None, batch_size: int = 8, **options: Any,
    ) -> None:  # fmt: skip
        where = {"server_model": server_model, "dtype": dtype, "device": device, "batch_size": batch_size}
        super().__init__(name, model, {template: "first second request"}, **where, **options)

    def beats(
        self, images: Sequence[Any], prompts: Sequence[str], groups: Sequence[Hashable] | None = None
    ) -> Callable[[int, int], float | None]:
        """`beats` for `combine.win_rates`: 1 where picture i is better than j, 0 where j is, .5 where neither is. All pairs of a group
        are asked about here, in one call, and only looked up afterwards.

        Each pair is shown in both orders, and the verdict is the mean: a model that always takes the first picture calls each pair a
        draw. None where one of the two answers is missing, or the two are no pair.

        Raises ValueError when the pictures of a group have different prompts.
        """
        verdicts, _ = self._compare(images, prompts, groups)
        return lambda i, j: verdicts.get((i, j))

    def judge(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[Judgement]:
        groups = context.get("groups")
        verdicts, why = self._compare(images, prompts, groups)
        names = prompts if groups is None else groups
        rates = win_rates([0.0] * len(images), names, beats=lambda i, j: verdicts.get((i, j)))
        won: list[dict[str, float]] = [{} for _ in images]
        for (i, j), verdict in verdicts.items():
            won[i][str(j)] = verdict
        nobody = "there is nobody to compare with"
        return [unjudged(why.get(i, nobody)) if r is None else Judgement(r, {"beats": won[i]}) for i, r in enumerate(rates)]

    def _compare(
        self, images: Sequence[Any], prompts: Sequence[str], groups: Sequence[Hashable] | None
    ) -> tuple[dict[tuple[int, int], float], dict[int, str]]:
        """(the verdict on each ordered pair that has one; why a picture lacks some)"""
        pictures, out = self._sort(images, prompts)
        names = prompts if groups is None else needed(self.name, {"groups": groups}, "groups", len(images))
        pairs = [(i, j) for i, j in combinations(pictures, 2) if names[i] == names[j]]
        if odd := next(((i, j) for i, j in pairs if prompts[i] != prompts[j]), None):
            raise ValueError(
                f"{self.name}: the pictures {odd[0]} and {odd[1]} are of one group, and have different prompts; give them one"
            )
        [template] = self.templates
        orders = [order for i, j in pairs for order in ((i, j), (j, i))]
        said = self._ask([template.conversation(first=pictures[i], second=pictures[j], request=prompts[i]) for i, j in orders])
        heard = {order: _better(answer) for order, answer in zip(orders, said, strict=True)}
        why = {i: str(j.details["skipped"]) for i, j in out.items()}
        verdicts, lost = {}, []
        for i, j in pairs:
            there, back = heard[i, j], heard[j, i]
            if isinstance(there, str) or isinstance(back, str):
                lost.append(there if isinstance(there, str) else str(back))
                why |= {i: lost[-1], j: lost[-1]}
            else:
                verdicts[i, j] = (there + 1 - back) / 2
                verdicts[j, i] = 1 - verdicts[i, j]
        self._warn(lost, len(pairs), "verdict", "pairs")
        return verdicts, why


def _better(said: Completion) -> float | str:
    """Whether the first picture is better, or why nobody knows."""
    found = None if said.error else read_better(said.text)
    return found if found is not None else said.error or f"no verdict in the answer {shown(said.text)[-200:]!r}"


# --- reading ------------------------------------------------------------------------------------------------------------
# None of these ever raises. Every repetition is bounded, or time would grow with the square of the length.

_YES = (  # also in Russian, Korean, Arabic, Hindi; Chinese, Japanese
    r"(?:(?:yes|yeah|true|correct|oui|s[i\u00ed]|ja|\u0434\u0430|\uc608|\ub124|\u0646\u0639\u0645|\u0939\u093e\u0901|\u0939\u093e\u0902)(?![^\W_])"
    r"|\u662f\u7684|\u662f(?!\u5426)|\u5bf9\u7684|\u306f\u3044)"
)
_NO = (
    r"(?:(?:no|nope|false|incorrect|non|nein|\u043d\u0435\u0442|\uc544\ub2c8\uc694|\uc544\ub2c8\uc624|\u0644\u0627|\u0928\u0939\u0940\u0902)(?![^\W_])"
    r"|\u4e0d|\u6ca1\u6709|\u5426|\u3044\u3044\u3048)"
)
_VERDICT = re.compile(rf"[\W_]{{0,40}}(?:(?P<yes>{_YES})|{_NO})(?!\s(?:and|or)\s(?:yes|no)\b)", re.I)
_LAST = re.compile(
    rf"[\W_]{{0,40}}(?:(?:final\s)?answer[\s*_]{{0,9}}(?:is|:|\uff1a)[\s*_\"']{{0,9}})?(?:(?P<yes>{_YES})|{_NO})[\W_]{{0,40}}",
    re.I,
)
_ANSWER = re.compile(r"<\s{0,9}answer\b[^<>]{0,40}>([^<]{0,200})", re.I)
_BETTER = {w: 1.0 for w in ("1", "first", "image 1", "picture 1", "image 1 is better", "picture 1 is better")}
_BETTER |= {w: 0.0 for w in ("2", "second", "image 2", "picture 2", "image 2 is better", "picture 2 is better")}
_BETTER |= {w: 0.5 for w in ("0", "same", "tie", "draw", "equal", "both", "neither", "both images are equally good")}
_IS_BETTER = re.compile(
    r"(?:image|picture)\s{0,3}([12])\s{1,3}is\s{1,3}(?:(?:the|clearly|slightly|much|overall)\s{1,3}){0,2}better|equally\s{1,3}good",
    re.I,
)
_BULLET = re.compile(
    r"(?:\[(?=\"))?[\s>*_`\"'\u2022\u00b7\u2013-]{0,20}(?:[(\[]?\d{1,3}\s?[.):\]\u3001\uff0e]\s{0,9})?[\s*_`\"']{0,20}"
)
_EDGE = " \t*_`\"',;"
_OBJECT = re.compile(r"\{[^{}]{1,2000}\}")


def read_verdict(text: str) -> bool | None:
    """Whether an answer says yes: in the last answer tag that says either, else in its last line if that is all it says, else as its
    first word. None where it says neither."""
    answer = answer_of(text)
    found = [m for tag in _ANSWER.finditer(answer) if (m := _VERDICT.match(tag[1]))]
    if not found:
        lines = [line for line in answer.splitlines() if line.strip()] or [""]
        found = [m for m in (_VERDICT.match(lines[0]), _LAST.fullmatch(lines[-1][-200:])) if m]
    return bool(found[-1]["yes"]) if found else None


def read_better(text: str) -> float | None:
    """1 where an answer says that the first picture is better, 0 the second, .5 that neither is: in a tag (<better>1</better>), else in
    words ("Image 2 is better"), else as all of the answer. The last one counts. None where it says nothing of the kind."""
    answer = answer_of(text)
    tags = (_bare(m[1]) for m in re.finditer(r"<\s{0,9}(?:better|answer)\b[^<>]{0,40}>([^<]{0,200})", answer, re.I))
    if found := [_BETTER[t] for t in tags if t in _BETTER]:
        return found[-1]
    words = [{"1": 1.0, "2": 0.0}.get(m[1] or "", 0.5) for m in _IS_BETTER.finditer(answer)]
    return words[-1] if words else _BETTER.get(_bare(answer[:200]) if len(answer) < 200 else "")


def read_checks(text: str, points: Iterable[str]) -> list[Check]:
    """The checks in an answer, each question once: from JSON (a list, one that was cut off, or one object a line), else from lines such
    as "counting | Are there three cats?", however numbered, bulleted or fenced."""
    answer, _ = split_reasoning(clean(text))
    items: list[Any] = []
    start, end = answer.find("["), answer.rfind("]")
    whole = _json(answer[start : end + 1]) if 0 <= start < end else None
    if isinstance(whole, list):
        items = whole
    if not any(_check(item) for item in items):
        items = [_json(m[0]) for m in _OBJECT.finditer(answer)]
    found = [c for c in map(_check, items) if c] or [
        c for line in answer.splitlines()[:LINES] if (c := _line_check(line, points))
    ]
    checks: dict[str, Check] = {}
    for check in found:
        checks.setdefault(check.question.casefold(), Check(check.question, _named(check.key_point, points)))
    return list(checks.values())


def key_point_names() -> dict[str, str]:
    """The 24 key points and what each means."""
    _, *lines = (FOLDER / "key-points.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name.strip(): meaning.strip() for name, _, meaning in pairs}


def _line_check(line: str, points: Iterable[str]) -> Check | None:
    line = line[_BULLET.match(line).end() :].strip() if len(line) <= 2 * LONGEST else ""  # type: ignore[union-attr]
    asks = any(mark in line for mark in "?\uff1f\u061f")
    cells = [cell.strip(_EDGE) for cell in line.replace("\uff5c", "|").strip("|").split("|")]
    if len(cells) > 1:
        name, question = cells[-2], cells[-1]
    elif (tail := re.search(r"[(\[]([^()\[\]]{1,60})[)\]]\W{0,9}\Z", line)) and _named(tail[1], points) != "other":
        name, question = tail[1], line[: tail.start()]
    else:
        head, colon, rest = line.partition(":")
        name, question = (head, rest) if colon and _named(head, points) != "other" else ("", line)
    if not asks and (len(cells) < 2 or _named(name, points) == "other"):  # a title, a remark
        return None
    return _check((name, question.strip(_EDGE)))


def _check(item: Any) -> Check | None:
    """From a question, (key point, question), or a JSON object with both; None where it is none of these."""
    name: Any = ""
    if isinstance(item, Check):
        return item
    if isinstance(item, dict):
        low = {str(k).lower().replace(" ", "_"): v for k, v in item.items()}
        name, item = low.get("key_point", low.get("keypoint", low.get("type", ""))), low.get("question", low.get("check"))
    elif isinstance(item, (list, tuple)) and len(item) == 2:
        name, item = item
    if not isinstance(item, str) or not isinstance(name, str):
        return None
    question = " ".join(item.split())
    if not any(c.isalnum() for c in question) or len(question) > LONGEST:
        return None
    return Check(question, " ".join(name.split())[:100] or "other")


def _named(name: str, points: Iterable[str]) -> str:
    """The key point that is meant, "other" where it is none."""
    said = _bare(name).replace("-", " ")
    return next((p for p in sorted(points, key=len, reverse=True) if p.replace("-", " ") in said), "other")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _bare(text: str) -> str:
    return " ".join(re.sub(r"[^\w-]+", " ", text).lower().split())
