"""Plant defects in the package, one at a time, and report those that no test notices (`make mutants`, an hour).

Usage: ``python tests/mutants.py [--only WORD] [--jobs N]``. Each mutant is an exact replacement in a copy of the package,
then the tests of its row run against that copy until one fails. A mutant that lives is a test that is missing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
LIMIT_S = 900


class Mutant(NamedTuple):
    """A defect: what it is, the file in the package, the text, what stands there instead, tests that should notice."""

    what: str
    file: str
    old: str
    new: str
    tests: str


SPLITS, FOLDERS = "tests/data/test_splits.py", "tests/data/test_folders.py"
DEVICE = "tests/training/test_device.py"
EXECUTORS = "tests/sweep/test_executors.py"
FACTORY, LOOP = "tests/training/test_build.py", "tests/training/test_loop.py"
LOSS_CLASSES = "tests/distill/test_loss_classes.py"
RESULTS = "tests/results/test_tables.py tests/results/test_stats.py"
TRAINED, CLASSES = "tests/training/test_trained.py", "tests/training/test_classes.py"
MUTANTS = [
    # the nine that lived when this list began
    Mutant(
        "test images leak into training",
        "training/build.py",
        "indices=part.train,",
        "indices=[*part.train[len(part.test) :], *part.test],",
        FACTORY,
    ),
    Mutant(
        "every split is split 0",
        "config/inputs.py",
        "return splits.random_split(len(entries), index=node.number), groups",
        "return splits.random_split(len(entries), index=0), groups",
        FACTORY,
    ),
    Mutant(
        "groups are ignored in k folds",
        "data/splits.py",
        "draws.split(listed.ids, listed.labels, listed.groups)",
        "draws.split(listed.ids, listed.labels, listed.ids)",
        SPLITS,
    ),
    Mutant(
        "validation tears groups apart",
        "data/splits.py",
        "groups = None if listed.groups is None else [listed.groups[i] for i in among]",
        "groups = None if listed.groups is None else [listed.ids[i] for i in among]",
        SPLITS,
    ),
    Mutant(
        "labels are left to chance",
        "data/splits.py",
        'return "unknown" not in self.labels and len(set(self.labels)) > 1',
        "return False",
        SPLITS,
    ),
    Mutant(
        "an image has the first of two groups",
        "data/split_files.py",
        "elif groups.setdefault(image_id, value) != value:",
        "elif groups.setdefault(image_id, value) is None:",
        SPLITS,
    ),
    Mutant(
        "of two data sets the first is taken", "data/folders.py", "if len(complete) > 1:", "if not complete:", FOLDERS
    ),
    Mutant(
        "images in other folders are not named",
        "data/folders.py",
        "self.ignore(ELSEWHERE, [file for file in rest if file.parent not in read and is_image(file)])",
        "self._used.update(file for file in rest if is_image(file))",
        FOLDERS,
    ),
    Mutant(
        "a label that is missing is unknown",
        "data/labels.py",
        "if missing := [stem for stem, label in by_stem.items() if not label]:",
        "if missing := [stem for stem, label in by_stem.items() if label is None]:",
        FOLDERS,
    ),
    Mutant("a group in two parts is taken", "data/splits.py", "if len(parts) > 1\n", "if len(parts) > 3\n", SPLITS),
    Mutant(
        "a file's split is another cell's",
        "config/inputs.py",
        'if settings.split.protocol != "paper":',
        'if settings.split.protocol == "kfold":',
        SPLITS,
    ),
    Mutant(
        "images of a group are clusters each",
        "results/stats.py",
        'groupby(["split", "image", "group"])[["points"]].mean().reset_index()',
        'groupby(["split", "image"])[["points"]].mean().reset_index().assign(group=lambda rows: rows["image"])',
        RESULTS,
    ),
    Mutant(
        "the Student ignores its seed",
        "training/build.py",
        "_new_network(settings.student, logits=settings.logits, seed=settings.seed,",
        "_new_network(settings.student, logits=settings.logits, seed=0,",
        FACTORY,
    ),
    Mutant(
        "the Teacher follows the cell's seed",
        "training/build.py",
        "logits=settings.logits, seed=settings.teacher.seed,",
        "logits=settings.logits, seed=settings.seed,",
        FACTORY,
    ),
    Mutant(
        "Teacher_WAug is trained on strong views",
        "training/build.py",
        "view=settings.teacher_aug.train_view if is_teacher else",
        'view="strong" if is_teacher else',
        FACTORY,
    ),
    Mutant(
        "a weak Teacher gets the strong mask",
        "training/loop.py",
        'batch[f"{learner.view}_mask"]',
        'batch["strong_mask"]',
        FACTORY,
    ),
    Mutant(
        "the temperature is ignored for logits",
        "distill/losses.py",
        "z_student, z_teacher = student.float() / temperature, teacher.float() / temperature",
        "z_student, z_teacher = student.float(), teacher.float()",
        f"tests/distill {FACTORY}",
    ),
    Mutant(
        "NaN in validation is not seen",
        "training/learner.py",
        '        self.check_finite(val, "validation batch")\n',
        "",
        f"{LOOP} -k not_finite",
    ),
    Mutant(
        "a Student is validated in train mode",
        "training/loop.py",
        "    learner.trained.eval()\n",
        "",
        f"{LOOP} -k eval_mode",
    ),
    Mutant(
        "a Student is left in eval mode",
        "training/loop.py",
        "    learner.trained.train()\n    watch.stop()",
        "    watch.stop()",
        f"{LOOP} -k eval_mode",
    ),
    # data
    Mutant(
        "validation images are trained on",
        "data/splits.py",
        "train=rest[validation:].tolist()",
        "train=rest.tolist()",
        f"tests/data/test_sources.py {FACTORY}",
    ),
    Mutant(
        "one test image fewer", "data/splits.py", "round(count * TEST_SHARE)", "int(count * TEST_SHARE)", "tests/data"
    ),
    Mutant(
        "order ignores the epoch",
        "data/loaders.py",
        "self.split_index, epoch]).perm",
        "self.split_index]).perm",
        "tests/data",
    ),
    Mutant(
        "views ignore the image",
        "data/loaders.py",
        ", epoch, id_number(self.images.ids[index])]",
        ", epoch]",
        "tests/data",
    ),
    Mutant(
        "views ignore the seed",
        "data/loaders.py",
        "seed=[self.seed, self.split_index, epoch,",
        "seed=[0, self.split_index, epoch,",
        "tests/data",
    ),
    Mutant(
        "the last partial batch is lost",
        "data/loaders.py",
        'return complete + (left > 0 and self.last_batch != "drop")',
        "return complete",
        "tests/data",
    ),
    Mutant("masks above 127 to above 128", "data/pixels.py", "levels > half\n", "levels > half + 1\n", "tests/data"),
    Mutant(
        "images lie on their side", "data/pixels.py", "ImageOps.exif_transpose(picture)", "picture.copy()", "tests/data"
    ),
    Mutant("levels are cut off, not rounded", "data/pixels.py", "levels.round()", "levels", "tests/data/test_dicom.py"),
    Mutant(
        "MONOCHROME1 is not inverted",
        "data/pixels.py",
        '255 - levels if data.PhotometricInterpretation == "MONOCHROME1" else levels',
        "levels",
        "tests/data/test_dicom.py",
    ),
    Mutant(
        "rescale slope and intercept are ignored",
        "data/pixels.py",
        "values = apply_modality_lut(pixels, data)",
        "values = pixels",
        "tests/data/test_dicom.py",
    ),
    Mutant(
        "the complete header of a DICOM file is read",
        "data/pixels.py",
        "pydicom.dcmread(file, specific_tags=ELEMENTS)",
        "pydicom.dcmread(file)",
        "tests/data/test_dicom.py",
    ),
    Mutant(
        "the fingerprint leaves the window out",
        "config/schema.py",
        "window: Window | None = None",
        "window: Annotated[Window | None, LOCAL] = None",
        "tests/config/test_decisions.py",
    ),
    Mutant(
        "prediction ignores the window of the training",
        "export/predict.py",
        "read_gray_or_color(file, model.window)",
        "read_gray_or_color(file)",
        "tests/export/test_predict.py -k window",
    ),
    Mutant("noise on each channel", "data/views.py", "per_channel=False", "per_channel=True", "tests/data"),
    Mutant("theta is not inverted", "data/views.py", "np.linalg.inv(matrix)", "matrix", "tests/data"),
    Mutant(
        "normalized to the wrong deviation",
        "data/views.py",
        "torch.tensor(IMAGENET_STD, device=device) * 255",
        "torch.tensor(IMAGENET_STD, device=device) * 256",
        "tests/data",
    ),
    Mutant(
        "weak mask from the strong view",
        "data/views.py",
        'weak_mask=weak["mask"]',
        'weak_mask=strong["mask"]',
        "tests/data",
    ),
    Mutant(
        "a dropped pixel is background",
        "data/views.py",
        "A.PixelDropout(dropout_prob=strengths.dropout, p=p)",
        "A.PixelDropout(dropout_prob=strengths.dropout, mask_drop_value=0, p=p)",
        "tests/data/test_views.py",
    ),
    Mutant(
        "half a pixel is background", "data/images.py", "(share >= 0.5)", "(share > 0.5)", "tests/data/test_images.py"
    ),
    Mutant(
        "duplicates shrink to a point",
        "data/duplicates.py",
        "1 / SCALE <= scale <= SCALE",
        "scale <= SCALE",
        "tests/data/test_duplicates.py -k shrink",
    ),
    Mutant(
        "folds are drawn with another seed",
        "data/splits.py",
        "(folds, shuffle=True, random_state=SPLIT_SEED)",
        "(folds, shuffle=True, random_state=SPLIT_SEED + 1)",
        SPLITS,
    ),
    Mutant(
        "lesion_px is the area of the prediction",
        "evaluation/scoring.py",
        "part.masks.bool().flatten(1).sum",
        "predictions.bool().flatten(1).sum",
        "tests/evaluation",
    ),
    Mutant(
        "the scores of two external sets are mixed",
        "results/tables/external.py",
        "scored_images(runs=scores.runs, scores=part)",
        "scored_images(runs=scores.runs, scores=scores.sweep.external)",
        "tests/export/test_score.py",
    ),
    Mutant(
        "of two runs of a name the first begun one predicts",
        "export/model.py",
        "return (finished or begun)[0]",
        "return begun[0]",
        "tests/export/test_predict.py -k name",
    ),
    Mutant(
        "the margin is that of the run begun first",
        "results/frame.py",
        "recorded[-1][KEY_OF_MARGIN]",
        "recorded[0][KEY_OF_MARGIN]",
        "tests/results/test_tables.py -k margin",
    ),
    Mutant(
        "of several adapters the last is trained and saved",
        "training/learner.py",
        'f"kd_path.{name}" if len(terms) > 1 else "kd_path": term',
        '"kd_path": term',
        f"{LOOP} -k adapter",
    ),
    Mutant(
        "a small batch weighs like a full one",
        "training/meter.py",
        "float((values.double() * images).sum() / images.sum())",
        "float(values.double().mean())",
        f"{LOOP} -k weighs",
    ),
    Mutant(
        "the predictions are those of other images",
        "training/outcome.py",
        "predictions[:, 0].numpy(), ids=part.ids)",
        "predictions[:, 0].numpy(), ids=part.ids[::-1])",
        f"{LOOP} -k best_epoch_is_tested",
    ),
    # distillation
    Mutant(
        "the maps are not warped",
        "distill/distillation.py",
        "theta = views.theta if align else None",
        "theta = None if align else views.theta",
        f"tests/distill {FACTORY}",
    ),
    Mutant(
        "positions outside the view count",
        "distill/distillation.py",
        "(grid.abs() <= 1).all(dim=-1)",
        "(grid.abs() <= 9).all(dim=-1)",
        "tests/distill tests/data/test_views.py",
    ),
    Mutant(
        "T squared forgotten, pixels",
        "distill/losses.py",
        "return temperature**2 * divergence.sum() / valid",
        "return divergence.sum() / valid",
        "tests/distill",
    ),
    Mutant(
        "T squared forgotten, positions",
        "distill/losses.py",
        "return temperature**2 * divergence.sum(dim=2).mean()",
        "return divergence.sum(dim=2).mean()",
        "tests/distill",
    ),
    Mutant(
        "KL the wrong way round",
        "distill/losses.py",
        "log_p.exp() * (log_p - log_q)",
        "log_q.exp() * (log_q - log_p)",
        "tests/distill",
    ),
    Mutant(
        "MSE over all positions",
        "distill/losses.py",
        "torch.where(valid, squared, 0.0).sum()",
        "squared.sum()",
        "tests/distill",
    ),
    Mutant(
        "H takes the largest channel",
        "distill/paths.py",
        '    def student_map(self, outputs: Outputs) -> Tensor:\n        """Return the Student\'s channel mean."""\n        return outputs[self.stage].float().mean(dim=1, keepdim=True)',
        "    def student_map(self, outputs: Outputs) -> Tensor:\n        return outputs[self.stage].float().amax(dim=1, keepdim=True)",
        "tests/distill",
    ),
    Mutant(
        "a ReLU of the regressor is missing",
        "distill/paths.py",
        "            nn.Conv2d(inner_channels, teacher_channels, kernel_size, padding=padding),\n            nn.ReLU(),",
        "            nn.Conv2d(inner_channels, teacher_channels, kernel_size, padding=padding),",
        "tests/distill",
    ),
    Mutant(
        "the ratio of gradients upside down",
        "distill/distillation.py",
        "norms[0] / norms[1].clamp_min(1e-12)",
        "norms[1] / norms[0].clamp_min(1e-12)",
        f"{LOOP} -k gradient_ratio",
    ),
    Mutant(
        "a matched weight upside down",
        "distill/distillation.py",
        "return ratio / (ratio + ratios",
        "return 1 - ratio / (ratio + ratios",
        f"{LOOP} -k matched",
    ),
    # methods
    Mutant(
        "the paper's gaps beside methods alone",
        "results/paper.py",
        "return others if others and set(notations).isdisjoint(CELLS) else [*CELLS, *others]",
        "return [*CELLS, *others]",
        "tests/results/test_tables.py",
    ),
    Mutant(
        "each method has a row of its own",
        "results/figures/contours.py",
        'name.removesuffix("_WAug").rpartition("_")[0] for name in others]',
        'name.partition("_")[0] for name in others]',
        "tests/results/test_contours.py",
    ),
    Mutant(
        "the Teacher runs to the Student's stage",
        "training/loop.py",
        ".update(kd.teacher_stages)",
        ".update(kd.stages)",
        "tests/training/test_loop.py",
    ),
    Mutant(
        "masks are not warped",
        "distill/distillation.py",
        "mask = _warped_mask(mask, theta=theta)",
        "pass",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "the Student's mask for the Teacher",
        "distill/distillation.py",
        "getattr(views, name)",
        "views.student_mask",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "terms are added without their shares",
        "distill/distillation.py",
        "term.share * values[name]",
        "values[name]",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "AT without its norm",
        "distill/methods.py",
        "return F.normalize(torch.where(valid, energy, 0.0).flatten(1))",
        "return torch.where(valid, energy, 0.0).flatten(1)",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "EMKD counts images without lesion",
        "distill/relations.py",
        "has_both.sum().clamp(min=1)",
        "has_both.numel()",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "IFVD takes the image's mean",
        "distill/relations.py",
        "_region_means(maps, regions, valid), regions)",
        "_region_means(maps, torch.ones_like(regions), valid), regions)",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "SPKD's rows are not normalized",
        "distill/relations.py",
        "F.normalize(flat @ flat.T, dim=1)",
        "flat @ flat.T",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "CIRKD compares an image with itself alone",
        "distill/relations.py",
        '"icp,jcq->ijpq", units, units',
        '"icp,icq->ipq", units, units)[:, None].expand(-1, len(units), -1, -1',
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "HCL weighs all sizes equally",
        "distill/methods.py",
        "        weight /= 2\n",
        "",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "MGD erases other positions in each evaluation",
        "distill/paths.py",
        "None if self.training else torch.Generator(maps.device).manual_seed(0)",
        "None",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "a published weight is the weight itself",
        "config/schema.py",
        "return self.kd.lambda_ / (1 + self.kd.lambda_)",
        "return min(self.kd.lambda_, 1.0)",
        "tests/distill/test_methods.py",
    ),
    Mutant(
        "the Teacher runs to its end",
        "models/unet.py",
        "min(last + 1 - DEPTH, DEPTH) + 1",
        "DEPTH + 1",
        "tests/models/test_unet.py",
    ),
    # training
    Mutant(
        "weight and 1 - weight exchanged",
        "training/learner.py",
        'weight * values["kd"] + (1 - weight) * supervised',
        '(1 - weight) * values["kd"] + weight * supervised',
        f"{LOOP} -k equation_one",
    ),
    Mutant("the last epoch is tested", "training/outcome.py", "    learner.restore_best()\n", "", LOOP),
    Mutant(
        "the best is the last equal one",
        "training/learner.py",
        "if monitored < self.best_loss:",
        "if monitored <= self.best_loss:",
        f"{LOOP} -k early_stopping",
    ),
    Mutant(
        "patience one longer",
        "training/learner.py",
        "self.epoch - self.best_epoch >= self.patience",
        "self.epoch - self.best_epoch > self.patience",
        f"{LOOP} -k early_stopping",
    ),
    Mutant(
        "the regressor is not trained",
        "training/learner.py",
        "torch.optim.Adam(self.trained.parameters(),",
        "torch.optim.Adam(self.network.parameters(),",
        f"{LOOP} -k reaches_the_student",
    ),
    Mutant(
        "Adam's moments are not resumed",
        "training/learner.py",
        '            self.optimizer.load_state_dict(training["optimizer"])\n',
        "",
        f"{LOOP} -k resumes_where",
    ),
    Mutant(
        "means of an epoch not resumed",
        "training/learner.py",
        '            self.means.load(training["means"]["steps"], training["means"]["counts"])\n',
        "",
        f"{LOOP} -k resumes_where",
    ),
    Mutant(
        "gradients pile up",
        "training/loop.py",
        "    learner.optimizer.zero_grad(set_to_none=True)",
        "    pass",
        "tests/test_golden.py",
    ),
    Mutant(
        "draws depend on the order of learners",
        "training/guard.py",
        "        torch.manual_seed(seed)\n",
        "",
        f"{LOOP} -k draws_in",
    ),
    Mutant(
        "what a user's code changes is not restored",
        "training/guard.py",
        "            SETTINGS[name][1](before[name])\n",
        "            pass\n",
        f"{LOOP} -k changes_what",
    ),
    Mutant(
        "a failed test costs the training",
        "training/outcome.py",
        "    learner.save_outcome()\n",
        "",
        f"{LOOP} -k failed_test",
    ),
    Mutant(
        "methods but the first are not checked",
        "sweep/plan.py",
        '"split": True}',
        '"split": True, "method": True}',
        "tests/sweep/test_preview.py -k each_of_these",
    ),
    Mutant(
        "the rehearsal reads nothing back",
        "sweep/rehearsal.py",
        "            _read_back(learner, part)\n",
        "",
        "tests/sweep/test_preview.py -k before_it",
    ),
    Mutant(
        "the Teacher is left in train mode",
        "models/networks.py",
        "return network.eval().requires_grad_(requires_grad=False)",
        "return network.requires_grad_(requires_grad=False)",
        FACTORY,
    ),
    Mutant(
        "the Teacher's learning rate is the Student's",
        "training/build.py",
        "lr=settings.teacher.lr if is_teacher",
        "lr=settings.train.lr if is_teacher",
        FACTORY,
    ),
    # evaluation
    Mutant(
        "threshold at logit 0.5",
        "evaluation/metrics.py",
        "return logits > 0\n",
        "return logits > 0.5\n",
        "tests/evaluation tests/test_golden.py",
    ),
    Mutant(
        "both empty scores 0",
        "evaluation/metrics.py",
        "torch.where(both_empty, 1.0, values.double())",
        "torch.where(both_empty, 0.0, values.double())",
        "tests/evaluation",
    ),
    Mutant("HD95 is HD90", "evaluation/metrics.py", "percentile=95", "percentile=90", "tests/evaluation"),
    Mutant(
        "validation Dice of empty pairs",
        "evaluation/metrics.py",
        "return torch.where(is_present.any(dim=1), mean, 1.0).mean()",
        "return mean.mean()",
        "tests/evaluation",
    ),
    Mutant(
        "the tolerance of NSD is ignored",
        "evaluation/metrics.py",
        "class_thresholds=[tolerance_px]",
        "class_thresholds=[2.0]",
        "tests/evaluation",
    ),
    # several classes
    Mutant(
        "KL of classes the wrong way round",
        "distill/losses.py",
        "F.kl_div(log_q, log_p,",
        "F.kl_div(log_p, log_q,",
        LOSS_CLASSES,
    ),
    Mutant(
        "classes that a batch lacks have a Dice",
        "distill/losses.py",
        "is_present.sum().clamp(min=1)",
        "len(is_present)",
        LOSS_CLASSES,
    ),
    Mutant(
        "the background has a Dice",
        "distill/losses.py",
        "shares, truth = logits.float().softmax(dim=1)[:, 1:], one_hot(mask, channels=logits.shape[1])[:, 1:]",
        "shares, truth = logits.float().softmax(dim=1), one_hot(mask, channels=logits.shape[1])",
        LOSS_CLASSES,
    ),
    Mutant(
        "EMKD compares the first two regions alone",
        "distill/relations.py",
        "combinations(range(regions.shape[1]), 2)",
        "combinations(range(2), 2)",
        LOSS_CLASSES,
    ),
    Mutant(
        "DKD's target is among the other classes",
        "distill/classes.py",
        "scaled.masked_fill(is_target, lowest)",
        "scaled",
        LOSS_CLASSES,
    ),
    Mutant(
        "logits keep their deviation",
        "distill/classes.py",
        "(logits.std(dim=1, keepdim=True) + 1e-7)",
        "1",
        LOSS_CLASSES,
    ),
    Mutant(
        "DIST's inter-class term is a cosine",
        "distill/classes.py",
        ".softmax(dim=1) - 1 / maps.shape[1]",
        ".softmax(dim=1)",
        LOSS_CLASSES,
    ),
    Mutant(
        "a warped pixel has two classes",
        "distill/distillation.py",
        "(shares & (shares.int().cumsum(dim=1) == 1))",
        "shares",
        LOSS_CLASSES,
    ),
    Mutant(
        "classes that an image lacks count",
        "evaluation/metrics.py",
        "is_present.sum(axis=0).clip(min=1)",
        "len(class_names)",
        "tests/evaluation",
    ),
    Mutant(
        "classes that an image lacks count in validation",
        "evaluation/metrics.py",
        "is_present.sum(dim=1).clamp(min=1)",
        "is_present.shape[1]",
        "tests/evaluation",
    ),
    Mutant(
        "the score of an absent class is a number",
        "evaluation/metrics.py",
        "np.where(is_present, values, np.nan)",
        "values",
        "tests/evaluation",
    ),
    # configuration
    Mutant(
        "the fingerprint leaves the data out",
        "config/inputs.py",
        'digests = {"data": listing(settings).digest}',
        "digests = {}",
        "tests/config",
    ),
    Mutant(
        "the fingerprint leaves the learning rate out",
        "config/schema.py",
        "lr: Annotated[Positive, Decides(STUDENTS)]",
        "lr: Annotated[Positive, LOCAL]",
        "tests/config",
    ),
    Mutant(
        "a Teacher's seed does not count",
        "config/identity.py",
        "else 0 if is_trained else settings.teacher.seed,",
        "else 0 if is_trained else settings.seed,",
        "tests/config",
    ),
    Mutant(
        "kd.ratio always counts",
        "config/schema.py",
        'Decides(when={"kd.weight": ("matched",)})',
        "Decides()",
        "tests/config",
    ),
    # store
    Mutant(
        "a checksum is not checked",
        "store/checkpoint.py",
        "if hashlib.sha256(memoryview(content)[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:",
        "if len(content) < DIGEST_BYTES:",
        "tests/store",
    ),
    Mutant(
        "a damaged marker counts",
        "store/cell_folder.py",
        'content.pop("seal", None) == _seal(content)',
        'content.pop("seal", None)',
        "tests/store",
    ),
    Mutant(
        "the cell of an older results version stays in its sweep",
        "store/sweep_file.py",
        "not (row.version < grid.RESULTS_VERSION and row.name in names)",
        "True",
        "tests/store",
    ),
    # tracking
    Mutant(
        "a cell that is computed again continues its old run",
        "tracking/mirror.py",
        'logged.status == "FINISHED" or not logged.continues(record):',
        'logged.status == "FINISHED":',
        "tests/tracking/test_mirror.py",
    ),
    Mutant(
        "runs of earlier computations stay",
        "tracking/mirror.py",
        "            if run.info.run_id != kept:\n                self.client.delete_run(run.info.run_id)\n",
        "            pass\n",
        "tests/tracking/test_mirror.py",
    ),
    Mutant(
        "a run that was deleted by hand counts",
        "tracking/mirror.py",
        "return logged if logged and self._statuses.get(logged.run_id) == logged.status else None",
        "return logged",
        "tests/tracking/test_mirror.py",
    ),
    Mutant(
        "an empty run that a lost answer has left stays until the cell is finished",
        "tracking/mirror.py",
        "(is_old or not run.data.metrics)",
        "is_old",
        "tests/tracking/test_mirror.py",
    ),
    Mutant(
        "a command that trains nothing leaves an empty parent run",
        "tracking/sync.py",
        "for folder in of if folder in versions]",
        "for folder in of]",
        "tests/tracking/test_sync.py",
    ),
    # results
    Mutant(
        "pairs of fewer runs",
        "results/stats.py",
        "if not places or not places <= baseline_places:",
        "if not places:",
        RESULTS,
    ),
    Mutant(
        "images of two splits count twice",
        "results/stats.py",
        '.groupby(rows["group"]).sum()',
        ".groupby(level=0).sum()",
        RESULTS,
    ),
    Mutant(
        "Holm without its maximum", "results/stats.py", "(ordered * factors).cummax()", "(ordered * factors)", RESULTS
    ),
    Mutant(
        "non-inferior by a margin of the wrong sign",
        "results/stats.py",
        "networks.p(mean + margin_points,",
        "networks.p(mean - margin_points,",
        RESULTS,
    ),
    Mutant(
        "Nadeau-Bengio without its correction",
        "results/stats.py",
        "(1 / len(means) + ratios.mean())",
        "(1 / len(means))",
        RESULTS,
    ),
    Mutant(
        "other trainings make a difference surer",
        "results/stats.py",
        "max(self.runs.error**2 - self.noise, 0.0)",
        "self.runs.error**2 - self.noise",
        RESULTS,
    ),
    Mutant(
        "Table 5 picks by test Dice",
        "results/tables/table4.py",
        "sort_values(VALIDATION, ascending=False)",
        'sort_values("mean_dice_percent", ascending=False)',
        "tests/results/test_costs.py tests/results/test_tables.py",
    ),
    Mutant(
        "different images mix",
        "results/mixing.py",
        '_refuse_several(_digests(sweep.runs, "data_digest")',
        '_refuse_several(_digests(sweep.runs.head(1), "data_digest")',
        "tests/results/test_tables.py",
    ),
    Mutant(
        "an effect with its sign turned",
        "results/tables/effects.py",
        "for sign in (1, -1))",
        "for sign in (-1, 1))",
        "tests/results/test_effects.py",
    ),
    Mutant(
        "strata of two images lie beside each other",
        "results/tables/strata.py",
        '.rank(method="first")',
        '.rank(method="first", ascending=False)',
        "tests/results/test_strata.py",
    ),
    # export
    Mutant(
        "damaged weights are used",
        "export/model.py",
        "if not cell_folder.check_file(folder, file.name):",
        "if False:",
        "tests/export",
    ),
    # tuning
    Mutant(
        "tuning: the worst trial is chosen",
        "tuning/study.py",
        "key=lambda trial: (trial.value or 0.0, -trial.number)",
        "key=lambda trial: (-(trial.value or 0.0), -trial.number)",
        "tests/tuning/test_study.py",
    ),
    Mutant(
        "tuning: trials of a round are drawn with one seed",
        "tuning/study.py",
        'zlib.crc32(f"{seed} {seed_of}".encode())',
        "seed",
        "tests/tuning/test_study.py",
    ),
    Mutant(
        "tuning: the grid is shuffled anew for each trial",
        "tuning/study.py",
        "issubclass(kind, QMCSampler | GridSampler)",
        "issubclass(kind, QMCSampler)",
        "tests/tuning/test_study.py",
    ),
    Mutant(
        "tuning: trials that reached later epochs before a break are asked about again",
        "tuning/pruning.py",
        "if trial.reported == epochs < trial.epochs:",
        "if trial.reported >= epochs:",
        "tests/tuning/test_pruning.py",
    ),
    Mutant(
        "tuning: earlier rounds are forgotten",
        "tuning/pruning.py",
        "if other.number // size < trial.number // size\n            or ",
        "if ",
        "tests/tuning/test_pruning.py",
    ),
    Mutant(
        "tuning: each distilled trial has a Teacher of its own",
        "tuning/space.py",
        ' if role != "distilled" or not grid.is_under(key, ("teacher",))}',
        "}",
        "tests/tuning/test_space.py",
    ),
    Mutant(
        "tuning: trials are tested",
        "training/group.py",
        "learner.result = end_trial(learner) if is_trial else finish(",
        "learner.result = finish(",
        "tests/sweep/test_tuner.py -k 'not_tested_before'",
    ),
    Mutant(
        "tuning: a pruned trial goes on",
        "training/learner.py",
        "if self.failure is not None or self.is_pruned:",
        "if self.failure is not None:",
        "tests/sweep/test_tuner.py -k 'never_change'",
    ),
    Mutant(
        "tuning: Students learn from the Teacher as configured",
        "sweep/tuner.py",
        "method.teacher = _teacher_overrides(method.job, methods)",
        "method.teacher = []",
        "tests/sweep/test_tuner.py -k 'chosen_teacher'",
    ),
    Mutant(
        "tuning: after a break nothing is decided again",
        "training/loop.py",
        "    after(first)\n",
        "",
        "tests/sweep/test_tuner.py -k 'stopped_while_it_decides'",
    ),
    Mutant(
        "tuning: pruned trials cost nothing",
        "results/tables/tuned.py",
        'trials[[*place, "round", "seconds", "dice"]]',
        'trials.loc[trials["state"] != "PRUNED", [*place, "round", "seconds", "dice"]]',
        "tests/results/test_tuned.py",
    ),
    # cuda
    Mutant(
        "cuda: backward passes run in TF32 whatever was asked for",
        "core/device.py",
        '_allow_tf32(allowed=self.precision == "tf32")  #',
        "_allow_tf32(allowed=True)  #",
        DEVICE,
    ),
    Mutant("cuda: TF32 stays on after a forward", "core/device.py", "_allow_tf32(allowed=before)", "pass", DEVICE),
    Mutant(
        "cuda: a lack of memory counts as a broken device",
        "core/device.py",
        " and not is_out_of_memory(error)",
        "return found",
        DEVICE,
    ),
    Mutant(
        "cuda: whoever sees the error is to blame",
        "training/guard.py",
        "if is_out_of_memory(error) or is_device_error(error):",
        "if is_out_of_memory(error):",
        f"{LOOP} -k failed_device",
    ),
    Mutant(
        "cuda: the state of a broken device is saved",
        "training/group.py",
        "if is_device_error(error):  #",
        "if False:  #",
        f"{LOOP} -k failed_device",
    ),
    Mutant(
        "executors: a cell that is lost with others fails",
        "sweep/executors/executor.py",
        "if len(results) == 1 and isinstance(results[0], LostError):",
        "if isinstance(results[0], LostError):",
        EXECUTORS,
    ),
    Mutant(
        "executors: half of what was lost is forgotten",
        "sweep/executors/executor.py",
        "(members[:half], members[half:])",
        "(members[:half], members[:half])",
        EXECUTORS,
    ),
    Mutant(
        "executors: what a dead process has finished is computed again",
        "sweep/executors/executor.py",
        'if record.status == "FINISHED" and work.is_requested:',
        "if False:",
        EXECUTORS,
    ),
    Mutant(
        "executors: an earlier failure counts as that of a lost process",
        "sweep/executors/executor.py",
        "record.error and record.ended_ms >= since_ms else error",
        "record.error else error",
        EXECUTORS,
    ),
    Mutant(
        "executors: a second Ctrl-C is not heard",
        "core/signals.py",
        "if number == signal.SIGINT and time.monotonic() - _State.since_s > AGAIN_S:",
        "if False:",
        EXECUTORS,
    ),
    Mutant(
        "executors: a signal that is sent twice at once saves nothing",
        "core/signals.py",
        "if number == signal.SIGINT and time.monotonic() - _State.since_s > AGAIN_S:",
        "if number == signal.SIGINT:",
        EXECUTORS,
    ),
    Mutant(
        "executors: SLURM's signals reach the process of a group",
        "sweep/executors/worker.py",
        "signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [])",
        EXECUTORS,
    ),
    Mutant(
        "slurm: a cancelled job is submitted again",
        "sweep/executors/slurm.py",
        'is_cancelled = ended[job.job_id] == "CANCELLED"',
        "is_cancelled = False",
        "tests/sweep/test_slurm.py",
    ),
    Mutant(
        "slurm: what an earlier job has finished is submitted again",
        "sweep/executors/slurm.py",
        "elif values and None not in values:",
        "elif False:",
        "tests/sweep/test_slurm.py",
    ),
    Mutant(
        "slurm: a requeued job is submitted again",
        "sweep/executors/slurm.py",
        '"PREEMPTED", "RECONFIG_FAIL",',
        '"PREEMPTED", "REQUEUED", "RECONFIG_FAIL",',
        "tests/sweep/test_slurm.py",
    ),
    Mutant(
        "estimate: the first free place is not the next",
        "core/progress.py",
        "heapq.heapreplace(ends_s, ends_s[0] +",
        "heapq.heapreplace(ends_s, ends_s[-1] +",
        "tests/core/test_progress.py",
    ),
    Mutant(
        "cuda: frozen weights are rounded at each forward",
        "models/networks.py",
        "if isinstance(module, nn.Conv2d | nn.Linear):",
        "if isinstance(module, nn.Linear):",
        "tests/training/test_rehearsal.py",
    ),
    Mutant(
        "cuda: a batch is copied to the device for each learner",
        "training/loop.py",
        "mask = batch[f",
        "batch = {k: v.cpu().to(v.device) for k, v in batch.items()}\n    mask = batch[f",
        "tests/training/test_rehearsal.py",
    ),
    Mutant(
        "cuda: a filled batch has the epoch's last images twice",
        "data/loaders.py",
        "keys += keys[: -len(keys) % self.batch_size]",
        "keys += keys[len(keys) - -len(keys) % self.batch_size :]",
        "tests/data/test_loaders.py",
    ),
    # the study's instruments
    Mutant(
        "study: a narrow network begins with the first channels",
        "models/weights.py",
        "torch.arange(count) * of // count",
        "torch.arange(count)",
        "tests/models/test_encoders.py",
    ),
    Mutant(
        "study: int8 is calibrated on test images",
        "export/quantize.py",
        'split_images(model, "train", ',
        'split_images(model, "test", ',
        "tests/export/test_quantize.py",
    ),
    Mutant(
        "study: the best network is that of the test images",
        "export/model.py",
        'sort_values(["val_dice", *PLACE], ascending=False)',
        "sort_values(PLACE)",
        "tests/export/test_card.py",
    ),
    Mutant(
        "study: an equally good network that costs more is on the front",
        "results/tables/capacity.py",
        "((cost < its_cost) | (gain > its_gain))",
        "((cost < its_cost) & (gain > its_gain))",
        "tests/results/test_capacity.py",
    ),
    Mutant(
        "study: published scores name folders",
        "core/files.py",
        'else COMPLETE_PATH.sub(r"\\1", value)',
        "else value",
        "tests/results/test_published.py",
    ),
    Mutant(
        "study: of two published states of a run the first one counts",
        "results/published.py",
        '.sort_values("done", ascending=False, kind="stable")',
        "",
        "tests/results/test_published.py",
    ),
    Mutant(
        "a trained Teacher depends on the rate of a training",
        "config/networks.py",
        "lr: Annotated[Positive, Decides(when=TRAINED_HERE)]",
        "lr: Positive",
        TRAINED,
    ),
    Mutant(
        "a trained Teacher's weights do not count",
        "config/identity.py",
        "inputs.trained_digest(settings) if is_trained else",
        "{} if is_trained else",
        TRAINED,
    ),
    Mutant(
        "an encoder alone is a trained Teacher",
        "training/trained.py",
        "label=label, complete=True)",
        "label=label)",
        TRAINED,
    ),
    Mutant(
        "images for validation may have been trained on",
        "training/trained.py",
        'for part in ("validation", "test") for',
        'for part in ("test",) for',
        TRAINED,
    ),
    Mutant(
        "an ensemble has the mean of the logits",
        "models/ensemble.py",
        "_log_mean(F.logsigmoid(logits)) - _log_mean(F.logsigmoid(-logits))",
        "logits.mean(dim=0)",
        TRAINED,
    ),
    Mutant(
        "an ensemble is trained as its first member",
        "training/group.py",
        "learner.network.load_state_dict(Ensemble(members).state_dict())",
        "pass",
        TRAINED,
    ),
    Mutant(
        "the members of an ensemble do not make it another Teacher",
        "config/identity.py",
        '{f"teacher.{name}": member.fingerprint for name, member in members.items()}',
        "{}",
        TRAINED,
    ),
    Mutant(
        "the order of classes does not count",
        "config/decisions.py",
        "list(settings.data.classes.items())",
        "settings.data.classes",
        CLASSES,
    ),
    Mutant(
        "an ensemble of several classes has the mean of the logits",
        "models/ensemble.py",
        "_log_mean(logits.log_softmax(dim=2))",
        "logits.mean(dim=0)",
        CLASSES,
    ),
    Mutant(
        "regions of several classes are one",
        "training/build.py",
        '"classes": len(settings.class_names) or 1}',
        '"classes": 1}',
        CLASSES,
    ),
    Mutant(
        "study: a further grid keeps the words of the first",
        "plugins/hydra_plugins/kdsweep_lockstep.py",
        "for override in overrides if override.key_or_group not in keys)",
        "for override in overrides)",
        "tests/sweep/test_sweeper.py",
    ),
]


def lives(mutant: Mutant) -> bool:
    """Return whether all tests of a mutant pass on a copy of the package that has it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in ("kdsweep", "tests", "conf", "benchmarks", "docs", "results"):
            if (ROOT / name).exists():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile"):
            shutil.copy(ROOT / name, copy / name)
        file = copy / "kdsweep" / mutant.file
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        paths = os.pathsep.join([str(copy), str(copy / "kdsweep" / "plugins")])
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutant.tests)]
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return False
    if done.returncode not in (0, 1):  # 1: a test failed; 2 and more: pytest itself could not
        raise RuntimeError(f"{mutant.what}: pytest ended with {done.returncode}: {done.stdout.decode()[-500:]}")
    return done.returncode == 0


def main() -> int:
    """Return 1 if a mutant lives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="word in what the mutant is, or in its file")
    parser.add_argument("--skip", type=int, default=0, help="number of mutants at the start to leave out")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    for mutant in MUTANTS:
        count = (ROOT / "kdsweep" / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1:
            parser.error(f"{mutant.what}: its text stands {count} times in kdsweep/{mutant.file}")
    chosen = [mutant for mutant in MUTANTS if options.only in f"{mutant.what} {mutant.file}"][options.skip :]
    living = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, is_alive in tqdm(zip(chosen, pool.map(lives, chosen), strict=True), total=len(chosen)):
            if is_alive:
                living += 1
                tqdm.write(f"lives: {mutant.file}: {mutant.what}", file=sys.stdout)
    sys.stdout.write(f"{living} of {len(chosen)} mutants live\n")
    return 1 if living else 0


if __name__ == "__main__":
    sys.exit(main())
