"""The report of runs of every kind and state, read as a browser would: nothing in it acts, nothing is loaded."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrid_rl.cli import main
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from hybrid_rl.report import write_report
from hybrid_rl.report.svg import Series, figure, lines, tick_labels

HOSTILE = (
    "<script>alert(1)</script></pre></title></svg><img src=x onerror=alert(2)>",
    "javascript:alert(3) [link](javascript:alert(4)) \x1b[31mred\x1b]0;owned\x07",
    "\u202eevil\u202c \x00 \ud800 \"quotes' &lt; {{ 7*7 }} {% raw %} --> ]]>",
    "A" * 1_000_000,
)
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "h4", "p", "strong", "nav", "a"),
    *("main", "dl", "dt", "dd", "div", "span", "section", "ul", "li", "table", "caption", "thead", "tbody", "tr", "th"),
    *("td", "figure", "figcaption", "svg", "g", "path", "polyline", "circle", "rect", "text", "details", "summary"),
    *("article", "pre", "footer", "code"),
}


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta" and not (self.get_starttag_text() or "").endswith("/>"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_inert(page: Page) -> None:
    """No script, no handler, nothing from elsewhere, and a policy that would stop them."""
    assert {tag for tag, _ in page.elements} <= TAGS
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "xlink:href")]
        assert tag != "a" or (attributes["href"] or "").startswith("#")
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert (policy or "").startswith("default-src 'none'; style-src 'sha256-")
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {(a["href"] or "")[1:] for a in page.all("a")} <= ids
    assert all(attributes.get("aria-label") for attributes in page.all("svg"))


def modules(treatment: str, layers: int, **more: Any) -> list[PlannedModule]:
    known: dict[str, Any] = {"rank": 4, "alpha": 4.0, "score": None, **more}
    kinds = ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.7.down_proj")
    return [
        PlannedModule(
            name=f"model.layers.{i}.{kind}",
            component="mlp",
            layer=i,
            shape=(8, 6),
            params=48,
            treatment=treatment,
            **known,
        )
        for i in range(layers)
        for kind in kinds
    ]


@pytest.fixture
def make(tiny_tree: dict, tmp_path: Path) -> Callable[..., Path]:
    """A run's directory with what is asked for in it."""

    def made(
        steps: int, *, plan: list[PlannedModule] | None = None, rollouts: bool = True, finished: bool = True, **row: Any
    ) -> Path:
        directory = tmp_path / "run <b>& 'long' name"
        (directory / "rollouts").mkdir(parents=True)
        (directory / "config.yaml").write_text(yaml.safe_dump({**tiny_tree, "steps": max(1, steps), "eval": {"k": 2}}))
        before = {"eval/accuracy": 0.25, "eval/ci/accuracy_low": 0.125, "eval/ci/accuracy_high": 0.5}
        before["eval/mean_at_k"] = 0.5
        summary = {"eval_before": before, "ranking_seconds": 3.0, "plan_hash": "x"}
        if finished:
            summary |= {"eval_after": {**before, "eval/accuracy": 0.75}, "wall_seconds": 4000, "steps": steps}
        if plan is not None:
            AdaptationPlan("org/model <i>", "attention-only", {"score": "a score"}, 0, tuple(plan)).save(
                directory / "plan.json"
            )
            (directory / "summary.json").write_text(json.dumps(summary))
        rows = [
            {
                **{"step": i, "reward/mean": i / steps, "reward/<b>part</b>/mean": 0.5, "policy/entropy": None},
                **{"time/step": 2.0, "time/generate": 1.5, "time/other": 0.5, "tokens/generated": 100},
                **{"sync/bytes": 1024, "sync/full_model_bytes": 1024**2, "faults/engine_restarts": int(i == 2)},
                **({"eval/accuracy": 0.75} if i == steps else {}),
                **row,
            }
            for i in range(1, steps + 1)
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 99, "rew')
        if rollouts:
            known = {"advantage": 0.5, "finish_reason": "stop", "tokens": 9, "weight_version": 0}
            lines = [
                {
                    **known,
                    **{"prompt": HOSTILE[(i + 1) % 3], "completion": text, "reward": [1.0, None, -0.5, 0.25][i]},
                    **{"rewards": {"<b>part</b>": 0.5, "other": None}, "failures": {"other": text[:200]}},
                }
                for i, text in enumerate(HOSTILE)
            ]
            for i in (1, steps):
                path = directory / "rollouts" / f"step_{i:06d}.jsonl"
                path.write_text("\n".join(map(json.dumps, lines)) + '\n{"half')
        return directory

    return made


def test_a_finished_run_is_told_and_hostile_text_is_only_text(make: Callable[..., Path]):
    directory = make(40, plan=modules("full", 4, rank=None, alpha=None, score=0.5))
    began = time.process_time()
    page = Page(write_report(directory))
    assert time.process_time() - began < 2
    check_inert(page)
    assert "run <b>& 'long' name - Hybrid-RL" in page.text
    for told in (
        "finished after 40 steps",
        "0.250 [0.125, 0.500]",
        "0.750",
        "each engine was sent 40 KiB; the whole model every time would have been 40 MiB",
        "rollout engine lost:",
        "engine_restarts: 1",
        "1 kind, below",
        "; without start-up",
        "mean_at_2 0.500",
        "1 h 06 min",
        "12 full",
        HOSTILE[0],
        "javascript:alert(3) [link](javascript:alert(4)) \\x1b[31mred\\x1b]0;owned\\x07",
        "\\u202eevil\\u202c \\x00 \\ud800 \"quotes' &lt; {{ 7*7 }} {% raw %} --> ]]>",
        "<b>part</b> 0.5 · other does not apply",
    ):
        assert told in page.text, told
    content = (directory / "report.html").read_text(encoding="utf-8")
    assert len(content) < 400_000, "a completion of a megabyte is cut"
    assert not set(content) & {"\x1b", "\x00", "\u202e", "\x07"}
    label = next(s["aria-label"] or "" for s in page.all("svg") if (s["aria-label"] or "").startswith("Reward by step"))
    assert "reward/mean from 0.025 to 1, between 0.025 and 1" in label


def test_a_killed_run_is_told_as_far_as_it_came(make: Callable[..., Path]):
    page = Page(write_report(make(3, plan=modules("lora", 2), rollouts=False, finished=False)))
    check_inert(page)
    assert "not finished: 3 of 3 steps" in page.text
    assert '"after" is its last evaluation' in page.text
    assert "Sample rollouts" not in page.text
    assert "Adaptation plan" in page.text


def test_a_run_that_ended_before_its_plan_has_a_report(make: Callable[..., Path]):
    page = Page(write_report(make(0, rollouts=False, finished=False)))
    check_inert(page)
    assert "no step was finished" in page.text
    assert "Resolved configuration" in page.text


def test_molf_shows_which_experts_were_stepped(make: Callable[..., Path]):
    plan = modules("molf", 3, rank=6, options={"ranks": [2, 4], "rank_stabilised": True})
    directory = make(2, plan=plan, **{"molf/weight_share": 0.5, "molf/expert_1_share": 0.25})
    stepped = {m.name: [4, 0, 2] for m in plan}
    (directory / "routing.jsonl").write_text(json.dumps({"step": 1, "updates": 4, "stepped": stepped}) + "\n")
    page = Page(write_report(directory))
    check_inert(page)
    labels = [s["aria-label"] or "" for s in page.all("svg")]
    assert [label for label in labels if "was stepped" in label] == [
        f"Heat map of how often {expert} was stepped, by layer and kind of matrix"
        for expert in ("weight", "expert_1", "expert_2")
    ]
    assert "100% of updates" in page.text


def test_a_long_run_is_thinned(make: Callable[..., Path]):
    directory = make(3000, plan=modules("lora", 60, score=1.0), **{"faults/reward_timeout": 1})
    began = time.process_time()
    page = Page(write_report(directory))
    assert time.process_time() - began < 4  # and that much of the machine's time goes to reading it again
    assert max(len((p["points"] or "").split()) for p in page.all("polyline")) <= 160
    assert "reward_timeout: 3000" in page.text


def test_the_command_says_where_the_report_is(make: Callable[..., Path], capsys: pytest.CaptureFixture, tmp_path: Path):
    out = tmp_path / "elsewhere.html"
    assert main(["report", str(make(2)), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    check_inert(Page(out))
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_thinning_means_or_sums():
    series = Series("a", (1.0, 2.0, 3.0, 4.0, 5.0), (1.0, 3.0, 5.0, 7.0, 9.0))
    assert series.thinned(5) is series
    assert series.thinned(3) == Series("a", (1.5, 3.5, 5.0), (2.0, 6.0, 9.0))
    assert series.thinned(3, summed=True) == Series("a", (1.5, 3.5, 5.0), (4.0, 12.0, 9.0))


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        *(
            (0.0, "", "0"),
            (0.1234567, "", "0.1235"),
            (1e-9, "", "1e-09"),
            (12345.0, "", "12.3 k"),
            (2.5e9, "", "2.5 G"),
        ),
        *((1536.0, "bytes", "1.5 KiB"), (3.0, "bytes", "3 B"), (2.0**41, "bytes", "2 TiB"), (-0.5, "", "-0.5")),
    ],
)
def test_figures_are_for_people(value: float, unit: str, told: str):
    assert figure(value, unit) == told


@pytest.mark.parametrize(
    ("ticks", "unit", "told"),
    [
        ((0.0, 5e3, 1e4), "", ["0", "5 k", "10 k"]),
        ((0.0, 0.5, 1.0), "", ["0", "0.5", "1.0"]),
        ((-1.0, 0.0, 1.0), "", ["-1", "0", "1"]),
        ((1e-7, 1.5e-7), "", ["1e-07", "1.5e-07"]),
        ((123450.0, 123460.0), "", ["123.45 k", "123.46 k"]),
        ((0.0, 2.0**20, 2.0**21), "bytes", ["0", "1 MiB", "2 MiB"]),
        ((0.0, 2.0**19, 2.0**20), "bytes", ["0", "0.5 MiB", "1.0 MiB"]),
        ((7.0,), "", ["7"]),
    ],
)
def test_the_labels_of_an_axis_have_one_unit(ticks: tuple[float, ...], unit: str, told: list[str]):
    assert tick_labels(ticks, unit) == told


def test_no_label_of_an_axis_is_cut_off():
    for values in ((0.0, 3_072_000.0), (1_000_000_000.0, 1_000_000_100.0), (-1e-9, 1e-9)):
        picture = lines("Bytes", [Series("a", (1.0, 2.0), values)], "bytes" if values[0] == 0 else "")
        labels = re.findall(r'class="tick end" x="([\d.]+)" y="[\d.]+">([^<]+)<', picture)
        assert len(labels) > 1
        assert all(float(x) > 7 * len(label) for x, label in labels)
