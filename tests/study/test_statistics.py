"""The statistics of studies against what their data were drawn from, and against other libraries."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hybrid_rl.study.statistics import (
    Scores,
    Spread,
    holm,
    interval,
    p_value,
    replicates,
    seeds_needed,
    spread,
)
from tests.study.synthetic import found_in, make_study, pretend

FEW = 200
"""Resamples, where many studies are drawn."""


def draw_difference(draw: np.random.Generator, of: Spread, seeds: int, problems: int, mean: float = 0.0) -> Scores:
    """Differences [S, P] between two methods, with these variances."""
    rest = math.sqrt(of.rest) * draw.standard_normal((seeds, problems))
    of_seeds = math.sqrt(of.seeds) * draw.standard_normal((seeds, 1))
    return mean + of_seeds + math.sqrt(of.problems) * draw.standard_normal(problems) + rest


def beside(draw: np.random.Generator, difference: Scores) -> dict[str, Scores]:
    """Two methods that differ by so much, on problems and with seeds that are harder or easier for both."""
    seeds, problems = difference.shape
    common = 0.5 + 0.4 * draw.standard_normal(problems) + 0.05 * draw.standard_normal((seeds, 1))
    return {"a": common + difference, "b": common}


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(
    ("shared", "of"),
    [
        (False, Spread(4e-4, 0.0, 0.0)),
        (False, Spread(4e-4, 0.0, 0.16)),
        (False, Spread(0.0, 0.0, 0.16)),
        (True, Spread(4e-4, 0.0, 0.16)),
        (True, Spread(4e-4, 0.01, 0.04)),
        (True, Spread(0.0, 0.02, 0.16)),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, shared: bool, of: Spread):
    """Neither too narrow nor, by counting a problem's noise more than once, too wide."""
    draw, problems, studies = np.random.default_rng(1), 50, 200
    held, variances = 0, []
    for _ in range(studies):
        difference = draw_difference(draw, of, seeds, problems, 0.02)
        drawn = replicates(beside(draw, difference), shared=shared, resamples=FEW)
        found = interval(float(difference.mean()), drawn["a"] - drawn["b"], seeds)
        held += found.low <= 0.02 <= found.high
        variances.append((drawn["a"] - drawn["b"]).var())
    # Where problems are shared, what they do is known better than a t of so few seeds allows for.
    assert 0.9 <= held / studies <= (0.99 if seeds > 3 or not of.problems else 1.0)
    assert np.mean(variances) == pytest.approx(of.error(np.array([seeds]), problems)[0] ** 2, rel=0.25)


def test_methods_with_the_same_scores_do_not_differ_at_all():
    draw = np.random.default_rng(0)
    scores = draw.random((4, 30))
    for shared in (False, True):
        drawn = replicates({"a": scores, "other": scores**2, "b": scores.copy()}, shared=shared, resamples=FEW)
        assert (drawn["a"] == drawn["b"]).all()
        assert not (drawn["a"] == drawn["other"]).any()
        difference = drawn["a"] - drawn["b"]
        assert vars(interval(0.0, difference, 4)) == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert p_value(0.0, difference, 4) == 1.0


def test_methods_that_differ_by_a_constant_differ_by_it_in_every_replicate():
    scores = np.random.default_rng(0).random((5, 40))
    for shared in (False, True):
        drawn = replicates({"a": scores + 0.1, "b": scores}, shared=shared, resamples=FEW)
        assert np.allclose(drawn["a"] - drawn["b"], 0.1, atol=1e-9)


def test_a_share_of_many_methods_is_as_sure_whichever_stand_beside_it():
    draw = np.random.default_rng(3)
    many = {str(i): draw.random((6, 60)) + 0.3 * draw.random(60) for i in range(5)}
    together = replicates(many, shared=True)
    alone = replicates({"0": many["0"], "1": many["1"]}, shared=True)
    assert (together["0"] - together["1"]).std() == pytest.approx((alone["0"] - alone["1"]).std(), rel=0.1)


def test_one_seed_is_as_sure_as_its_problems_are_many():
    scores = np.random.default_rng(0).random((1, 400))
    for shared in (False, True):
        drawn = replicates({"a": scores}, shared=shared)["a"]
        found = interval(float(scores.mean()), drawn, 1)
        error = scores.std() / math.sqrt(400)
        assert drawn.std() == pytest.approx(error, rel=0.05)
        assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_p_is_a_t_test_over_seeds_where_problems_carry_no_noise(seeds: int):
    draw = np.random.default_rng(seeds)
    for shared in (False, True):
        for mean in (0.0, 0.02, 0.1):
            difference = np.repeat(draw.normal(mean, 0.05, (seeds, 1)), 30, axis=1)
            drawn = replicates({"a": difference}, shared=shared, resamples=20_000)["a"]
            p = p_value(float(difference.mean()), drawn, seeds)
            expected = float(np.asarray(stats.ttest_1samp(difference[:, 0], 0))[1])
            assert math.log(p) == pytest.approx(math.log(expected), rel=0.05, abs=0.03)


def test_p_is_uniform_where_there_is_no_difference():
    draw = np.random.default_rng(2)
    for shared, of in ((False, Spread(4e-4, 0.0, 0.16)), (True, Spread(4e-4, 0.0, 0.16))):
        found = []
        for _ in range(300):
            difference = draw_difference(draw, of, 5, 40)
            drawn = replicates({"a": difference}, shared=shared, resamples=FEW)["a"]
            found.append(p_value(float(difference.mean()), drawn, 5))
        assert stats.kstest(found, "uniform").statistic < 0.12
        assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.09


def naive_holm(p_values: list[float]) -> list[float]:
    """The smallest level at which each is rejected, by Holm's steps one after another."""
    found = {}
    for i, own in enumerate(p_values):
        levels = sorted({0.0, 1.0, *(min(1.0, p * k) for p in p_values for k in range(1, len(p_values) + 1))})
        for level in levels:
            rejected, left = set(), sorted(range(len(p_values)), key=lambda j: (p_values[j], j))
            while left and p_values[left[0]] <= level / len(left) * (1 + 1e-12):
                rejected.add(left.pop(0))
            if i in rejected or (level == 1.0 and own <= 1.0):
                found[i] = level
                break
    return [found[i] for i in range(len(p_values))]


def test_holm_rejects_what_its_steps_reject():
    draw = np.random.default_rng(0)
    cases = [[0.01, 0.04, 0.03, 0.005], [0.5], [], [0.2, 0.2, 0.9], [0.0, 1.0]]
    cases += [list(draw.random(n) ** 3) for n in (2, 5, 8)]
    for p_values in cases:
        assert holm(p_values) == pytest.approx(naive_holm(p_values)), p_values
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    ("shared", "of"), [(True, Spread(9e-4, 0.04, 0.09)), (False, Spread(9e-4, 0.0, 0.09)), (True, Spread(0, 0, 0.09))]
)
def test_variances_are_those_that_were_drawn(shared: bool, of: Spread):
    draw = np.random.default_rng(4)
    found = [spread(draw_difference(draw, of, 6, 80), shared=shared) for _ in range(400)]
    for name, value in vars(of).items():
        mean = np.mean([getattr(each, name) for each in found])
        # Negative variances are cut off at 0, which leaves a little where there is none.
        assert mean == pytest.approx(value, rel=0.1, abs=1e-4 if value else 1.2e-3), name
    assert spread(np.ones((1, 8)), shared=shared) is None


@pytest.mark.parametrize(
    ("shared", "of"),
    [
        (False, Spread(4e-4, 0.0, 0.16)),
        (False, Spread(1e-4, 0.0, 0.1)),
        (True, Spread(4e-4, 0.0, 0.16)),
        (True, Spread(9e-4, 0.001, 0.09)),
    ],
)
def test_so_many_seeds_find_the_effect_in_four_of_five_studies(shared: bool, of: Spread):
    draw, effect, problems, studies = np.random.default_rng(6), 0.03, 60, 200
    seeds = seeds_needed(of, effect, problems)
    assert seeds is not None
    assert 4 <= seeds <= 30
    found = 0
    for _ in range(studies):
        difference = draw_difference(draw, of, seeds, problems, effect)
        drawn = replicates({"a": difference}, shared=shared, resamples=FEW)["a"]
        found += p_value(float(difference.mean()), drawn, seeds) < 0.05
    assert 0.7 <= found / studies <= 0.9


def test_problems_can_be_too_few_for_any_number_of_seeds():
    of = Spread(1e-4, 0.04, 0.1)
    assert seeds_needed(of, 0.03, 100) is None
    assert seeds_needed(of, 0.03, 5000) is not None
    assert seeds_needed(Spread(0.0, 0.0, 0.0), 0.03, 100) == 2
    by_seeds = [seeds_needed(Spread(v, 0.0, 0.1), 0.03, 500) or 0 for v in (0.0, 1e-4, 1e-3, 1e-2)]
    assert by_seeds == sorted(by_seeds)


def test_an_analysis_finds_what_was_put_in(tmp_path: Path):
    """One comparison of a study, recomputed by hand from the results' scores."""
    levels = {"full": 0.7, "lora": 0.6, "same": 0.6}
    study = make_study(
        tmp_path,
        {"full": {}, "lora": {"set": {"adaptation": "lora"}}, "same": {"set": {"adaptation": "lora"}}},
        seeds=6,
        compare=[("full", "lora"), ("same", "lora")],
        recovery={"of": "full", "over": "lora"},
    )
    results = pretend(study, lambda t: levels[t.method] + 0.01 * (t.seed % 3) * (t.method == "full"))
    analysis = found_in(study, results)
    by_seed = {
        name: np.array([r.scores["test"]["mean_at_k"] for r in results.values() if r.method == name])
        for name in ("full", "lora")
    }
    difference = by_seed["full"] - by_seed["lora"]
    first, second = analysis.comparisons
    assert first.difference.value == pytest.approx(difference.mean())
    assert (first.wins, first.seeds, first.problems) == (6, 6, difference.shape[1])
    assert first.adjusted == pytest.approx(2 * first.p)
    assert first.needed[first.problems] is not None
    assert first.verdict == "better"
    assert vars(second.difference) == {"value": 0.0, "low": 0.0, "high": 0.0}  # the same settings are the same run
    assert (second.verdict, second.wins) == ("not settled", 0)
    (full, lora, same) = analysis.tasks["task"]
    assert full.scores["test"].value == pytest.approx(by_seed["full"].mean())
    assert same.recovered["test"].value == 0.0
    assert not lora.recovered
    assert not full.recovered
    assert analysis.runs == 12


def test_areas_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Each of two curves over three ranks is a method as `_compare` sees it: trapezoids over log2 of 1, 2, 8."""
    methods = {f"{k}_{r}": {"set": {"lora.rank": r + 10 * (k == "b")}} for k in "ab" for r in (1, 2, 8)}
    curves = {f"area_{k}": {"ranks": [1, 2, 8], "methods": [f"{k}_{r}" for r in (1, 2, 8)]} for k in "ab"}
    study = make_study(tmp_path, methods, curves=curves, compare=[["area_a", "area_b"]])
    levels = {"a_1": 0.5, "a_2": 0.6, "a_8": 0.7, "b_1": 0.3, "b_2": 0.6, "b_8": 0.6}
    results = pretend(study, lambda t: levels[t.method] + 0.003 * t.seed * (t.method[0] == "a"))
    analysis = found_in(study, results)
    means = {
        m: [float(np.mean(r.scores["test"]["mean_at_k"])) for r in results.values() if r.method == m] for m in levels
    }
    area = {
        k: [(x + y) / 2 / 3 + (y + z) / 3 for x, y, z in zip(*(means[f"{k}_{r}"] for r in (1, 2, 8)), strict=True)]
        for k in "ab"
    }
    differences = np.subtract(area["a"], area["b"])
    (found,) = analysis.comparisons
    assert found.difference.value == pytest.approx(differences.mean())
    assert found.wins == int((differences > 0).sum())
    assert (found.verdict, found.seeds) == ("better", 5)
    for k in "ab":
        assert analysis.areas["task", f"area_{k}", "test"].value == pytest.approx(np.mean(area[k]))


def test_runs_that_are_all_alike_settle_nothing() -> None:
    alike = np.full((4, 1), 0.25)
    drawn = replicates({"a": alike + 0.1, "b": alike}, shared=False)
    assert p_value(0.1, drawn["a"] - drawn["b"], 4) == 1.0
