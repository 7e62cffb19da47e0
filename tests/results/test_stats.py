"""Statistics worked out by hand, or by their law."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, wilcoxon

from kdsweep.core.errors import InputError
from kdsweep.results import paper, stats


def paired_frame(ours, baseline):
    return pd.DataFrame({"dice_ours": ours, "dice_baseline": baseline}, dtype=float)


def scored(notation, dice, *, split=0, teacher=""):
    images = [f"image{i}" for i in range(len(dice))]
    own = {"fingerprint": f"{notation}-{split}", "notation": notation, "split": split, "seed": 0, "teacher": teacher}
    return pd.DataFrame({"image": images, "dice": dice}).assign(**own)


def test_holm_by_hand():
    # 4 x 0.01 = 0.04; 3 x 0.02 = 0.06; 2 x 0.02 = 0.04, held up to 0.06; 0.9
    adjusted = stats.holm(pd.Series([0.9, 0.02, 0.01, 0.02], index=list("dbac")))
    assert adjusted.to_dict() == pytest.approx({"d": 0.9, "b": 0.06, "a": 0.04, "c": 0.06})


def test_holm_leaves_three_of_the_papers_twelve():
    adjusted = stats.holm(pd.Series({cell: paper.PAPER[cell][3] for cell in paper.CELLS}))
    assert set(adjusted[adjusted < 0.05].index) == {"L_KLD_WAug", "HReg_KLD", "L_KLD"}
    assert adjusted["L_KLD_WAug"] == pytest.approx(12 * 0.0012)
    assert adjusted["L_KLD"] == pytest.approx(10 * 0.0037)
    assert adjusted["H_KLD"] == pytest.approx(9 * 0.0067)


def test_holm_skips_what_is_not_there_and_never_passes_one():
    adjusted = stats.holm(pd.Series([np.nan, 0.03, 0.6, 0.7]))
    assert adjusted.iloc[1:].tolist() == pytest.approx([0.09, 1.0, 1.0])
    assert np.isnan(adjusted.iloc[0])


@pytest.mark.parametrize("test", ["ttest", "wilcoxon"])
def test_equal_scores_give_p_one_without_a_warning(test):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stats.p_value(paired_frame([0.5, 0.7, 0.9], [0.5, 0.7, 0.9]), test=test) == 1.0


def test_t_test_by_hand():
    # differences 1, 2, 3: t = 2 sqrt(3); with two degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    p = stats.p_value(paired_frame([2, 4, 6], [1, 2, 3]), test="ttest")
    assert p == pytest.approx(1 - np.sqrt(12 / 14))


def test_wilcoxon_by_hand():
    # five differences of one sign: 2 of the 2^5 signings are as extreme
    p = stats.p_value(paired_frame([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]), test="wilcoxon")
    assert p == pytest.approx(2 / 32)


@pytest.mark.parametrize("pairs", [([], []), ([0.5], [0.4]), ([0.75, 0.5], [0.5, 0.25])])
def test_no_p_without_two_pairs_or_without_spread(pairs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(stats.p_value(paired_frame(*pairs), test="ttest"))


def test_wilcoxon_needs_no_spread():
    assert stats.p_value(paired_frame([0.75] * 5, [0.5] * 5), test="wilcoxon") == wilcoxon([0.25] * 5).pvalue


def test_interval_is_seeded_contains_the_mean_and_narrows_with_n():
    differences = np.random.default_rng(3).normal(4, 10, 99)
    low, high = stats.mean_interval(differences)
    assert (low, high) == stats.mean_interval(differences)
    theirs = bootstrap((differences,), np.mean, n_resamples=stats.RESAMPLES, random_state=np.random.default_rng(0))
    assert (low, high) == tuple(theirs.confidence_interval)
    assert low < differences.mean() < high
    half = 1.96 * differences.std(ddof=1) / np.sqrt(99)
    assert [low, high] == pytest.approx([differences.mean() - half, differences.mean() + half], abs=0.15 * half)


def test_interval_without_spread_or_pairs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stats.mean_interval(np.array([2.0, 2.0, 2.0])) == (2.0, 2.0)
        assert np.isnan(stats.mean_interval(np.array([2.0]))).all()


def test_pairs_are_of_one_image_whatever_the_order():
    ours, baseline = scored("L_MSE", [0.1, 0.2, 0.3]), scored("Student", [0.4, 0.5, 0.6])
    pairs = stats.pair(ours=ours.iloc[::-1], baseline=baseline.iloc[[1, 2, 0]])
    assert pairs["dice_ours"].tolist() == [0.1, 0.2, 0.3]
    assert pairs["dice_baseline"].tolist() == [0.4, 0.5, 0.6]


def test_a_split_without_a_baseline_leaves_no_pair_and_one_without_us_is_refused():
    one, both = (pd.concat([scored("L_MSE", [0.1], split=split) for split in splits]) for splits in ((0,), (0, 1)))
    assert stats.pair(ours=both, baseline=one).empty
    with pytest.raises(InputError, match="different images: 1 without a partner, the first is image0 of split 1"):
        stats.pair(ours=one, baseline=both)


def test_own_teachers_are_those_of_the_link():
    teachers = [scored(name, [0.9], split=split) for name in ("Teacher", "Teacher_WAug") for split in (0, 1)]
    ours = scored("L_MSE", [0.1, 0.2], teacher="Teacher_WAug-0")
    assert stats.own_teachers(ours=ours, scored=pd.concat(teachers))["fingerprint"].tolist() == ["Teacher_WAug-0"]
