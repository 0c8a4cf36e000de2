"""The comparison end to end on a task of milliseconds: results, fairness, refusals, divergence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError, TrainingError
from rankwise.core.piece import Piece, register
from rankwise.core.protocols import Perturbation
from rankwise.core.recipe import Recipe
from rankwise.lab import result
from rankwise.lab.compare import run_compare
from rankwise.lab.training import Starts, rate_at, train, with_horizon
from tests.lab.tiny_task import TinyTask

RECIPES = ["lora(rank=2)", "lora(rank=2) + sgd", "full"]


@register("perturbation")
class LabTwice(Perturbation):
    """Moves a little and takes the gradient again, as SAM does."""

    second_pass = True

    def move(self, blocks, *, learning_rate):
        self.kept = [(tensor, tensor.detach().clone()) for block in blocks.values() for tensor in block.values()]
        with torch.no_grad():
            for tensor, _ in self.kept:
                tensor.add_(1e-3)

    def restore(self, blocks):
        with torch.no_grad():
            for tensor, before in self.kept:
                tensor.copy_(before)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_compare(TinyTask(), RECIPES, steps=24, seeds=3, rates=3, out=tmp_path_factory.mktemp("all") / "out", quiet=True)


def test_every_recipe_has_all_seeds_costs_and_files(found) -> None:
    assert [row.recipe for row in found.rows] == RECIPES
    for row in found.rows:
        assert (row.finished, row.diverged) == (3, 0)
        assert row.metric is not None
        assert row.metric.count == 3
        assert row.retention is not None
        assert row.cost["relative_flops"] > 1
        assert row.cost["relative_saved_bytes"] > 1
        assert row.cost["head"] == 3 * 12 + 3
        assert row.sweep_steps > 0
        assert all(len(run["curve"]) == 24 for run in row.runs)
        folder = found.out / row.runs[0]["adapter"]
        assert row.adapter_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert found.row("full").cost["trained"] == 8 * 12 + 12 * 12
    assert found.row("lora(rank=2)").cost["trained"] == 2 * (8 + 12) + 2 * (12 + 12)
    assert found.row("lora(rank=2) + sgd").cost["state"] == 0
    assert {path.name for path in found.out.iterdir()} >= {"results.sqlite", "report.html", "comparison.json", "adapters"}
    saved = json.loads((found.out / "comparison.json").read_text())
    assert saved["winner"] == found.winner
    assert len(saved["differences"]) == 3


def test_it_learns_and_the_saved_winner_gives_the_recorded_measure(found) -> None:
    best = found.row(found.winner)
    assert best.metric is not None
    assert best.metric.mean > max(0.5, found.base["metrics"]["accuracy"] + 0.1)
    task, run = TinyTask(), best.runs[1]
    model = task.fresh_model(run["seed"])
    rankwise.load_(model, found.out / run["adapter"])
    assert task.evaluate(model.eval())["accuracy"] == run["metrics"]["accuracy"]


def test_recipes_see_the_same_head_batches_and_dropout() -> None:
    task, seen = TinyTask(), []
    for text in ("lora(rank=2)", "lora(rank=3)"):
        run = train(task, rankwise.compose(text), learning_rate=1e-9, seed=4, steps=6, batch_size=16, starts=Starts(task, 2))
        seen.append(run.curve)
    assert seen[0] == pytest.approx(seen[1], abs=1e-5)  # at a tiny rate both are the base
    assert len(set(seen[0])) == 6


def test_global_randomness_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    run_compare(TinyTask(), ["lora(rank=2)"], steps=8, seeds=1, learning_rates=[1e-2], out=tmp_path / "out", quiet=True)
    assert torch.equal(before, torch.random.get_rng_state())


def test_spectra_are_those_of_the_saved_update(found) -> None:
    run = found.row("lora(rank=2)").runs[0]
    model = TinyTask().fresh_model(run["seed"])
    handle = rankwise.load_(model, found.out / run["adapter"])
    for site, stored in run["spectra"].items():
        values = torch.linalg.svdvals(handle.update_of(site).dense().detach())[:2]
        assert stored["values"] == pytest.approx(values.tolist(), rel=1e-3)
        assert 1 <= stored["stable_rank"] <= stored["effective_rank"] + 1e-9 <= 2 + 1e-6
    assert set(run["spectra"]) == {"first", "second"}
    assert found.row("full").runs[0]["spectra"]["second"]["norm"] > 0
    assert found.row("full").runs[1]["spectra"] is None


def test_one_seed_is_never_resolved_and_says_so(tmp_path: Path) -> None:
    found = run_compare(TinyTask(), RECIPES[:2], steps=8, seeds=1, learning_rates=[1e-2], out=tmp_path / "out", quiet=True)
    assert not any(gap.resolved for gap in found.differences)
    assert any("NOT resolved" in sentence and "--seeds 3" in sentence for sentence in found.statements)


def test_resolved_and_unresolved_sentences() -> None:
    def row(recipe: str, values: list[float]) -> result.Row:
        runs = [
            {"seed": seed, "outcome": "finished", "metrics": {"accuracy": value}, "seconds_per_step": 0.1, "start_seconds": 0.0}
            | {"retention": None, "adapter_bytes": 1, "learning_rate": 1e-3, "curve": [value]}
            for seed, value in enumerate(values)
        ]
        return result.make_row(recipe, runs, {"best": 1e-3, "scores": [], "at_edge": False, "steps": 0}, {}, "accuracy")

    rows = [row("good", [0.91, 0.9, 0.92, 0.9]), row("near", [0.90, 0.92, 0.91, 0.89]), row("bad", [0.5, 0.49, 0.52, 0.48])]
    _, winner, sentences = result.judge(rows, "accuracy", True)
    assert winner == "good"
    assert any(sentence.startswith("NOT resolved: good leads near") for sentence in sentences)
    assert any(sentence.startswith("Resolved: good is better than bad by 0.41") for sentence in sentences)
    _, winner, sentences = result.judge(rows, "accuracy", False)
    assert winner == "bad"
    assert any(sentence.startswith("Resolved: bad is better than good by 0.41") for sentence in sentences)


def test_recipes_that_trained_identically_are_named(tmp_path: Path) -> None:
    texts = ["lora(rank=2)", "lora(rank=2) + reflora(warmup=1000)"]
    found = run_compare(TinyTask(), texts, steps=8, seeds=2, learning_rates=[1e-2], out=tmp_path / "out", quiet=True)
    assert any("trained identically" in sentence for sentence in found.statements)
    texts[1] = "lora(rank=2) + reflora(warmup=1)"
    found = run_compare(TinyTask(), texts, steps=8, seeds=2, learning_rates=[1e-2], out=tmp_path / "other", quiet=True)
    assert not any("trained identically" in sentence for sentence in found.statements)


@pytest.mark.parametrize(
    "text",
    [
        "full + galore(rank=2)",
        "dora(rank=2) + lora_one(rank=2)",
        "dora(rank=2) + pissa(rank=2) + reflora(warmup=2)",
        "dora(rank=2) + reflora(warmup=2) + bar",
        "lora(rank=2) + scaled_gd + sgd",
        "lora(rank=2) + sam",
        "lora(rank=2) + lora_ggpo",
        "lora(rank=2) + zeroth_order",
        "dora(rank=2) + zeroth_order(directions=2, difference='derivative') + adamw",
        "lora(rank=2) + zo_rank(candidates=4, line_search=2)",
        "lora(rank=2) + relora(interval=4)",
        "adalora(rank=3, target_rank=1, total_steps=16, warmup_steps=2, final_steps=2)",
        "lora_sb(rank=2)",
        "vera(rank=4)",
        "eva(rank=2)",
        "sora(rank=3)",
    ],
)
def test_compositions_run_end_to_end(text: str, tmp_path: Path) -> None:
    found = run_compare(TinyTask(), [text], steps=16, seeds=1, learning_rates=[1e-2], out=tmp_path / "out", quiet=True)
    (run,) = found.rows[0].runs
    assert run["outcome"] == "finished", run
    assert run["curve"][-1] != run["curve"][0]
    assert found.rows[0].cost["trained"] > 0
    assert any(site["norm"] > 0 for site in run["spectra"].values())


def test_divergence_is_an_outcome(tmp_path: Path) -> None:
    task = TinyTask()
    found = run_compare(
        task, ["lora(rank=2)", "full + sgd"], steps=8, seeds=2, learning_rates=[1e-2, 1e30], out=tmp_path / "out", quiet=True
    )
    row = found.row("full + sgd")
    assert row.sweep[2][1e30] is None
    assert row.learning_rate == 1e-2
    alone = run_compare(task, ["full + sgd"], steps=8, seeds=2, learning_rates=[1e30], out=tmp_path / "alone", quiet=True)
    assert alone.winner is None
    assert alone.rows[0].diverged == 2
    assert "diverged" in alone.rows[0].note
    assert "the loss of step" in alone.rows[0].runs[0]["reason"]
    assert (tmp_path / "alone" / "report.html").is_file()


def test_every_rate_diverging_is_said(tmp_path: Path) -> None:
    found = run_compare(
        TinyTask(poisoned_from=1), ["lora(rank=2)"], steps=8, seeds=1, rates=2, out=tmp_path / "out", quiet=True
    )
    assert found.rows[0].note == "every learning rate diverged"
    assert found.statements[0].startswith("No recipe finished")


@pytest.mark.parametrize("text", ["lora(rank=2) + zeroth_order", "lora(rank=2) + zo_rank"])
def test_methods_without_backward_diverge_as_others_do(text: str, tmp_path: Path) -> None:
    found = run_compare(TinyTask(poisoned_from=2), [text], steps=8, seeds=1, learning_rates=[1e-3], out=tmp_path, quiet=True)
    assert found.rows[0].diverged == 1 and found.rows[0].runs[0]["reason"]


def test_nan_in_the_first_batch_is_an_error_about_the_data(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="frozen base has the loss nan"):
        run_compare(TinyTask(poisoned_from=0), ["lora(rank=2)"], steps=8, seeds=1, out=tmp_path / "out", quiet=True)


def test_two_pass_methods_get_their_replay(tmp_path: Path) -> None:
    plain = rankwise.compose("lora(rank=2)")
    recipe = Recipe(**{**plain.__dict__, "perturbation": Piece("perturbation", "LabTwice")})
    task = TinyTask()
    run = train(task, recipe, learning_rate=1e-2, seed=0, steps=5, batch_size=16, starts=Starts(task, 1))
    assert len(run.curve) == 5
    assert not run.failure


@pytest.mark.parametrize(
    ("recipes", "options", "words"),
    [
        ([], {}, "at least one recipe"),
        (["lora", "lora(rank=8)"], {}, "are the same"),
        (["lorra"], {}, "Did you mean"),
        (["lora"], {"steps": 2}, "steps >= 4"),
        (["lora"], {"seeds": 0}, "seeds must be"),
        (["lora"], {"learning_rates": "best"}, "'auto' or numbers"),
        (["lora"], {"learning_rates": [0.0]}, "positive numbers"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path: Path, recipes, options, words) -> None:
    with pytest.raises(ArgumentError, match=words):
        run_compare(TinyTask(), recipes, **{"steps": 8, **options}, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_illegal_recipes_are_refused_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        run_compare(TinyTask(), ["lora(rank=2)", "lora(rank=50)", "lora(rank=60)"], steps=8, out=tmp_path / "out", quiet=True)
    assert "rank is 50" in str(caught.value)
    assert "rank is 60" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_at(step, 100) for step in range(100)]
    assert factors.index(max(factors)) in (5, 6)
    assert max(factors) == pytest.approx(1.0, abs=0.02)
    assert 0 < factors[-1] < 0.02
    assert [rate_at(0, 1), rate_at(0, 2)] == [1.0, 1.0]
    assert math.isfinite(sum(rate_at(step, 7) for step in range(7)))


def test_clocks_are_shortened_in_proportion() -> None:
    recipe = rankwise.compose("adalora(rank=4, target_rank=2, total_steps=40, warmup_steps=10, final_steps=8)")
    assert recipe.schedule is not None
    short = with_horizon(recipe, 10, 40).schedule
    assert short is not None
    assert {name: short.arguments[name] for name in ("total_steps", "warmup_steps", "final_steps")} == {
        "total_steps": 10,
        "warmup_steps": 2,
        "final_steps": 2,
    }
    assert short.arguments["target_rank"] == 2
    assert with_horizon(recipe, 40, 40) == recipe
    assert with_horizon(rankwise.compose("lora + reflora(warmup=8)"), 10, 40).step[0].arguments["warmup"] == 2
    plain = rankwise.compose("lora")
    assert with_horizon(plain, 10, 40) == plain


def test_a_schedule_that_did_not_finish_is_told(tmp_path: Path) -> None:
    text = "adalora(rank=3, target_rank=1, total_steps=100, warmup_steps=2)"
    found = run_compare(TinyTask(), [text], steps=8, seeds=1, learning_rates=[1e-2], out=tmp_path / "out", quiet=True)
    assert any(sentence.startswith(text + ": ") and "100" in sentence for sentence in found.statements)
