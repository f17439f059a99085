"""The report of studies, read as a browser would, and its picture."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hybrid_rl.report.svg import COLOURS, Mark, Series, forest, lines
from hybrid_rl.study import drawing
from hybrid_rl.study.analysis import Analysis
from hybrid_rl.study.drawing import draw_study
from hybrid_rl.study.page import render_study, write_study_report
from hybrid_rl.study.tables import between
from hybrid_rl.study.trials import Trial
from tests.report.test_page import Page, check_inert
from tests.study.synthetic import PROBLEMS, found_in, make_study, pretend

HOSTILE = "<script>alert(1)</script>"
LORA = {"adaptation": "lora", "lora.rank": 8}
LEVELS = {"full": 0.8, "lora": 0.5, "near": 0.505, "draw_1": 0.6, "draw_2": 0.62, HOSTILE: 0.55}


def level(t: Trial) -> float:
    """Rates above 1e-3 do harm; seeds differ by the method."""
    rate = dict(t.rates).get("lora.lr", 1e-3)
    return LEVELS[t.method] - 20 * abs(rate - 1e-3) + 0.01 * ((t.seed * 7 + len(t.method)) % 5 - 2)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    directory = tmp_path_factory.mktemp("study")
    study = make_study(
        directory,
        {
            "full": {"set": {"adaptation": "full"}},
            "lora": {"set": LORA, "rates": {"lora.lr": [1e-3, 2e-3, 3e-3]}},
            "near": {"set": {**LORA, "lora.rank": 4}, "rates_of": "lora", "also": "half the rank & more"},
            "draw_1": {"set": {**LORA, "lora.rank": 2}, "pool": "drawn"},
            "draw_2": {"set": {**LORA, "lora.rank": 1}, "pool": "drawn"},
            HOSTILE: {"set": {**LORA, "lora.rank": 3}, "also": "</table><img src=x onerror=alert(2)>"},
        },
        title="Is <b>full</b> better?",
        tasks={"sums": {}, "</pre><script>": {"data.max_prompt_length": 32}},
        compare=[("full", "lora"), ("near", "lora"), ("lora", "drawn")],
        recovery={"of": "full", "over": "lora"},
        curves={"ranks <i>": {"ranks": [1, 2, 4], "methods": ["draw_2", "draw_1", "near"]}},
    )
    results = pretend(study, level, tokens=lambda t: 4000 if t.method == "full" else 1000)
    gone = [r.key for r in results.values() if (r.method, r.seed) == ("near", 3)]
    return found_in(study, {key: r for key, r in results.items() if key not in gone})


@pytest.fixture(scope="module")
def page(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_study_report(analysis, path)
    return Page(path)


def test_nothing_on_the_page_acts(analysis: Analysis, page: Page):
    check_inert(page)
    content = render_study(analysis)
    (style,) = re.findall("<style>(.*?)</style>", content, re.DOTALL)
    said = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert f"style-src 'sha256-{said}'" in (policy or "")
    assert "<script" not in content
    for told in (HOSTILE, "</table><img src=x onerror=alert(2)>", "</pre><script>", "Is <b>full</b> better?"):
        assert told in page.text, told
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_plain_statement_comes_first(analysis: Analysis, page: Page):
    found = [c for c in analysis.comparisons if c.significant]
    assert {(c.better, c.verdict) for c in found} == {("full", "better"), ("lora", "worse")}
    text = page.text
    assert "Of 6 comparisons, 4 are significant at the 5 % level, after Holm's correction" in text
    assert "2 of these went against the claim. 2 are not settled" in text
    assert "no evidence that they are alike" in text
    assert text.index("not settled") < text.index("What was run") < text.index("Comparisons")
    for c in analysis.comparisons:
        difference = f"{between(c.difference, 100, '+.1f')} points, p {c.adjusted:.2g} after Holm"
        if c.significant:
            against = ", against the claim" if c.better == "lora" else ""
            assert f"{c.better} is {c.verdict} than {c.worse} on {c.task}, test{against}: {difference}" in text
        else:
            assert f"near against lora on {c.task}, test: {difference}" in text
            assert f"3 points on {PROBLEMS} problems, {c.needed[PROBLEMS]} seeds are needed; there were 4" in text


def test_remarks_and_what_was_run(page: Page):
    for told in (
        "near has no result for seeds [3]",
        "the best rate is at the end of what was tried for lora, near",
        "full sampled 4.00 times the tokens of",
        "58 (methods x tasks x seeds: 60)",
        "drawn: draw_1, draw_2",
        "hybrid-rl 9.9.9",
        "mean_at_k: share of sampled answers that are right",
        "half the rank & more",
    ):
        assert told in page.text, told


def test_figures_are_those_of_the_analysis(analysis: Analysis, page: Page):
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    for task, arms in analysis.tasks.items():
        (label,) = [la for la in labels if la.startswith(f"mean_at_k on {task}, test: ")]
        by_value = sorted(arms, key=lambda arm: -arm.scores["test"].value)
        assert label.endswith("; ".join(f"{a.name} {between(a.scores['test'])}" for a in by_value))
        for arm in arms:
            row = f"{len(arm.seeds)} {between(arm.scores['test'])} "
            if (share := arm.recovered.get("test")) is not None:
                row += f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}] "
            assert f"{row}123,456 1.884 MiB 5 MiB" in page.text
        (label,) = [la for la in labels if la.startswith(f"Differences on {task}, test in points: ")]
        compared = [c for c in analysis.comparisons if c.task == task]
        assert all(f"{c.better} - {c.worse} {between(c.difference, 100, '+.1f')}" in label for c in compared)
        for c in compared:
            told = f"{between(c.difference, 100, '+.1f')} {c.p:.2g} {c.adjusted:.2g} {c.wins} of {c.seeds} {c.verdict}"
            assert told in page.text
    for (task, name, held_out), area in analysis.areas.items():
        assert f"{name} {task}, {held_out} 1, 2, 4 {between(area)}" in page.text
    assert len(analysis.areas) == 2


def test_curves_rates_power_and_settings(analysis: Analysis, page: Page):
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    for along in ("step", "sampled tokens"):
        assert any(label.startswith(f"sums, validation by {along}: full from 0.3 to 0.8") for label in labels)
    tried = analysis.choices["sums", "lora"].tried
    assert f"lora.lr 0.001 {tried[0][1]:.3f} chosen, at the end of the grid" in page.text
    assert f"lora.lr 0.002 {tried[1][1]:.3f} lora sums" in page.text
    c = analysis.comparisons[0]
    assert f"full - lora sums, test {' '.join(str(c.needed[m]) for m in (128, 256, 640, 1319, 5000))}" in page.text
    assert "choose_on: validation" in page.text
    assert "rates_of: lora" in page.text


def test_a_study_without_results_or_comparisons_is_told(tmp_path: Path):
    study = make_study(tmp_path, {"full": {"set": {"adaptation": "full"}}}, seeds=1)
    for results, told in (({}, "full has no result and is left out"), (pretend(study, level), "one seed:")):
        path = tmp_path / "report.html"
        write_study_report(found_in(study, results), path)
        page = Page(path)
        check_inert(page)
        assert told in page.text
        assert "The study compares nothing: it claims nothing to be better" in page.text
        assert "Seeds needed" not in page.text


def test_secrets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", "abcdefgh12345")
    study = make_study(tmp_path, {"full": {}}, seeds=1, title="of abcdefgh12345")
    assert "abcdefgh12345" not in render_study(found_in(study, {}))


def test_more_arms_than_colours_are_split_over_charts(tmp_path: Path):
    names = [f"rank {i}" for i in range(1, COLOURS + 3)]
    study = make_study(tmp_path, {n: {"set": {**LORA, "lora.rank": i}} for i, n in enumerate(names, 1)}, seeds=2)
    path = tmp_path / "report.html"
    write_study_report(found_in(study, pretend(study, lambda t: 0.5)), path)
    page = Page(path)
    assert "validation by step, arms 1 to 9 of 11" in page.text
    assert "validation by step, arms 10 to 11 of 11" in page.text
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    assert [la.count("rank") for la in labels if la.startswith("validation")] == [9, 2]
    assert "sampled tokens" not in page.text, "all sampled alike"


def test_a_forest_plot_stands_where_its_figures_are():
    marks = [Mark("a <b>", 2.0, 1.0, 3.0, "2 [1, 3]"), Mark("b" * 90, 0.5, -1.0, 2.0, "0.5 [-1, 2]", filled=False)]
    picture = forest("Differences", marks, "points", zero=True)
    (zero,) = re.findall(r'class="zero" d="M([\d.]+)', picture)
    spans = [tuple(map(float, m)) for m in re.findall(r'class="whisker" d="M([\d.]+) [\d.]+H([\d.]+)', picture)]
    dots = [float(x) for x in re.findall(r'<circle class="[^"]+" cx="([\d.]+)', picture)]
    unit = (spans[0][1] - spans[0][0]) / 2
    assert dots[0] - float(zero) == pytest.approx(2 * unit, abs=0.2)
    assert spans[1][0] == pytest.approx(float(zero) - unit, abs=0.2)
    assert dots[1] == pytest.approx(float(zero) + unit / 2, abs=0.2)
    assert re.findall(r'<circle class="([^"]+)"', picture) == ["dot s0", "open"]
    assert "<title>a &lt;b&gt;: 2 [1, 3]</title>" in picture
    assert f"<title>{'b' * 90}: 0.5 [-1, 2]</title>" in picture
    assert f">{'b' * 29}…</text>" in picture
    assert 'aria-label="Differences in points: a &lt;b&gt; 2 [1, 3]; ' in picture


@pytest.mark.parametrize("value", [0.0, 0.5, -3e-7, 1e9])
def test_a_forest_plot_of_one_sure_figure(value: float):
    assert "NaN" not in forest("x", [Mark("a", value, value, value, "sure")], zero=True)


def test_tokens_below_a_chart_have_a_unit():
    picture = lines("Score", [Series("a", (0.0, 3e6), (0.5, 0.75))], "", along="sampled tokens")
    assert 'aria-label="Score by sampled tokens: a from 0.5 to 0.75' in picture
    assert ">2.0 M<" in picture
    assert "<title>sampled tokens 3 M\na: 0.75</title>" in picture


def test_the_picture_has_a_panel_a_task(analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures: list[Figure] = []
    monkeypatch.setattr(drawing.plt, "close", figures.append)
    for name in ("study.png", "study.svg"):
        draw_study(analysis, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["sums, test", "</pre><script>, test"]
    best = max(analysis.tasks["sums"], key=lambda arm: arm.scores["test"].value)
    assert panels[0].get_yticklabels()[0].get_text() == best.name == "full"
    assert panels[0].lines[0].get_xdata()[0] == best.scores["test"].value  # type: ignore[index]
    study = make_study(tmp_path, {"full": {}}, seeds=1)
    with pytest.raises(ValueError, match="no results to draw"):
        draw_study(found_in(study, {}), tmp_path / "none.png")
