import json

import numpy as np
import pytest

from dora_mm.eval.images.classifier import REQUIRED, Classifier
from dora_mm.eval.images.encoder import Features, concatenate
from dora_mm.eval.images.scores import METRICS, Scores, concatenate_seeds, metrics_table, summarize
from dora_mm.eval.images.style import CLASSES, STYLES
from samples.build.judge.fitting import fit_classifier


@pytest.fixture(scope="module")
def gallery(features, concepts):
    """Features of the gallery's icons by style, in the order of `learned`."""
    rows = np.array([concept.split == "pretrain" for concept in concepts])
    return {style: part[rows] for style, part in features.items()}


def test_judges_real_icons_correctly(classifier, gallery, learned):
    for name in ("brick", "3d"):
        scores = classifier.scores(gallery[name], learned, (0,))
        assert scores.in_style(name).mean() == 1.0
        assert scores.recognised().mean() == 1.0
        assert scores.both(name).mean() == 1.0
        assert scores.log_odds(name).mean() > 2
    flat = classifier.scores(gallery["flat"], learned, (0,))
    assert flat.in_style("3d").mean() < 0.2
    assert flat.log_odds("3d").mean() < 0
    distances = [
        summarize(classifier.scores(gallery[style], learned, (0,)), "3d", classifier.style_space, over_seeds=False)[
            "frechet"
        ].mean
        for style in ("3d", "flat")
    ]
    assert distances[0] < distances[1]


def test_scores_of_each_image_are_in_its_cell(classifier, gallery, learned):
    """All seeds of a concept are adjacent; here the second image of the last concept shows another one."""
    interleaved = concatenate([gallery["flat"][np.array([row, row])] for row in range(len(learned))])
    order = np.arange(2 * len(learned))
    order[-1] = 0
    ranks = classifier.scores(interleaved[order], learned, (0, 1)).ranks
    assert ranks.shape == (len(learned), 2)
    assert ranks[-1, 1] > 1
    assert (np.delete(ranks.ravel(), -1) == 1).all()


def test_report_of_its_own_accuracy(classifier):
    assert set(classifier.report["accuracy"]) == {*STYLES, "3d against fluent flat"}
    assert classifier.report["num_concepts"] == {"judge": 15, "pretrain": 12}
    own = classifier.report["frechet"]
    assert min(own["brick"], key=own["brick"].get) == "brick"
    assert classifier.report["accuracy"]["brick"]["mean"] >= REQUIRED["brick"]
    assert "brick 100.0%" in classifier.describe()


def test_artefacts_of_the_unet_are_not_taken_for_style(features, concepts, classifier):
    """Flat icons that it took for 3D are classified as flat once it was fitted on denoised icons as well."""
    seen = np.array([concept.split == "judge" for concept in concepts])
    offset = features["3d"].texture.mean(axis=0) - features["flat"].texture.mean(axis=0)
    judged = {style: part[seen] for style, part in features.items()}
    denoised = {style: Features(part.content, part.texture + 0.8 * offset) for style, part in judged.items()}

    def flat_share(which):
        return (which.classifier.log_probabilities(denoised["flat"].texture).argmax(axis=1) == 0).mean()

    refitted = fit_classifier(concepts, features, classifier.origin, denoised)
    assert flat_share(classifier) < 0.5 < 0.9 < flat_share(refitted)
    assert set(refitted.report["accuracy_denoised"]) == set(refitted.report["accuracy"])
    assert "noised and predicted back" in refitted.describe()
    assert "accuracy_denoised" not in classifier.report


def test_reports_when_it_is_not_accurate_enough(classifier):
    inaccurate = Classifier(**{**vars(classifier), "report": json.loads(json.dumps(classifier.report))})
    inaccurate.report["accuracy"]["3d against fluent flat"]["mean"] = 0.8
    assert "NOT ACCURATE ENOUGH TO JUDGE: 3d against fluent flat only 80.0% (needs 90%)" in inaccurate.describe()


def test_scores_the_same_after_saving_and_loading(classifier, gallery, learned, tmp_path):
    classifier.save(tmp_path)
    loaded = Classifier.load(tmp_path)
    for style in STYLES:
        one, other = (which.scores(gallery[style], learned, (0,)) for which in (classifier, loaded))
        assert other.log_probabilities == pytest.approx(one.log_probabilities, abs=1e-3)
        assert (other.ranks == one.ranks).all()
    assert loaded.report == classifier.report
    assert loaded.choose("all") == classifier.choose("all")


def test_a_folder_without_a_valid_classifier_is_named(classifier, tmp_path):
    with pytest.raises(ValueError, match=r"classifier: .*nowhere.*fit one"):
        Classifier.load(tmp_path / "nowhere")
    classifier.save(tmp_path)
    (tmp_path / "judge.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"classifier: {tmp_path} contains no valid classifier.*fit one"):
        Classifier.load(tmp_path)
    classifier.save(tmp_path)
    (tmp_path / "judge.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=rf"classifier: {tmp_path} contains no valid classifier.*fit one"):
        Classifier.load(tmp_path)


def test_rejects_a_model_that_it_was_not_fitted_for(classifier):
    classifier.check_model(64, "none")
    with pytest.raises(ValueError, match=r"classifier: .*64 px and another VAE.*128 px"):
        classifier.check_model(128, "none")
    with pytest.raises(ValueError, match=r"judge_tiny\.yaml"):
        classifier.check_model(64, "other")


def test_chooses_concepts_by_role(classifier, learned):
    assert [concept.name for concept in classifier.choose("tune", 3)] == ["thing 1", "thing 5", "thing 9"]
    assert len(classifier.choose("all")) == len(learned)
    with pytest.raises(ValueError, match="concepts: .*6 with role tune, not 7"):
        classifier.choose("tune", 7)


def test_scores_survive_a_file(classifier, gallery, learned, tmp_path):
    parts = [classifier.scores(gallery["3d"], learned, (seed,)) for seed in (3, 4)]
    combined = concatenate_seeds(parts)
    combined.save(tmp_path / "scores" / "a.json")
    loaded = Scores.load(tmp_path / "scores" / "a.json")
    assert (loaded.codes, loaded.seeds) == (combined.codes, (3, 4))
    assert loaded.projected == pytest.approx(combined.projected, abs=1e-2)
    assert (loaded.ranks == combined.ranks).all()
    found = summarize(loaded, "3d", classifier.style_space, over_seeds=True)
    assert list(found) == list(METRICS)
    assert all(cell.low <= cell.mean <= cell.high for cell in found.values() if cell.has_ends)
    assert [name for name, cell in found.items() if not cell.has_ends] == ["frechet"]
    table = metrics_table({"adapter": found})
    assert "| adapter | 100 % (" in table


def test_soft_both_is_the_probability_over_the_rank():
    log_probabilities = np.log(np.array([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]]))
    scores = Scores(("x",), (0, 1), log_probabilities, np.zeros((1, 2, 2)), np.array([[1, 4]]))
    assert list(CLASSES) == ["flat", "3d", "brick"]
    assert scores.soft_both("3d") == pytest.approx(np.array([[0.3, 0.2]]))
    assert scores.both("3d").tolist() == [[0.0, 0.0]]
    assert scores.in_style("3d").tolist() == [[0.0, 1.0]]
