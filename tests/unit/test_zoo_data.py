"""What the zoo's DataModules hand out."""

import copy
import pickle
import subprocess
import sys
from itertools import islice

import pytest
import torch
from sklearn.datasets import make_classification

from lightning_accel import zoo
from lightning_accel.zoo.data.digits import PIXEL_MEAN, PIXEL_STD, SCALE, SHIFT, distort
from lightning_accel.zoo.data.loading import EpochSampler, ResumableLoader, training_loader
from lightning_accel.zoo.data.splits import split
from lightning_accel.zoo.data.topics import VOCAB_SIZE, decode, encode

DATA = {
    "Digits": ({}, (64, 1, 8, 8), (64,)),
    "BreastCancer": ({}, (32, 30), (32,)),
    "Classification": ({"features": 100, "informative": 5, "samples": 200}, (32, 100), (32,)),
    "Topics": ({"length": 16, "batch_size": 8}, (8, 16), (8, 16)),
    "AddingProblem": ({"length": 10, "samples": 200}, (64, 10, 2), (64,)),
    "CopyTask": ({"delay": 4, "string_length": 3, "samples": 200}, (64, 10), (64, 10)),
}


def ready(name, **changes):
    data = getattr(zoo, name)(**{**DATA[name][0], **changes})
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", DATA)
def test_batches_have_the_documented_shapes(name):
    data = ready(name)
    x, target = next(iter(data.train_dataloader()))
    assert (tuple(x.shape), tuple(target.shape)) == DATA[name][1:]
    assert x.dtype == (torch.int64 if name in ("Topics", "CopyTask") else torch.float32)
    assert target.dtype == (torch.float32 if name == "AddingProblem" else torch.int64)


@pytest.mark.parametrize("name", DATA)
def test_equal_seeds_give_equal_data_and_order(name):
    torch.manual_seed(1)
    first = [batch for batch in ready(name, seed=3).train_dataloader()]  # noqa: C416  # reads as what it is
    torch.manual_seed(2)
    second = list(ready(name, seed=3).train_dataloader())
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
    other = next(iter(ready(name, seed=4).train_dataloader()))
    assert not torch.equal(first[0][0], other[0])


@pytest.mark.parametrize("name", DATA)
def test_second_setup_changes_nothing(name):
    data = ready(name)
    before = data.parts
    data.setup("test")
    assert data.parts is before


@pytest.mark.parametrize("name", DATA)
def test_data_modules_can_be_copied_and_pickled(name):
    data = ready(name)
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert torch.equal(next(iter(twin.val_dataloader()))[0], next(iter(data.val_dataloader()))[0])


@pytest.mark.parametrize("name", ["Digits", "BreastCancer", "Classification"])
def test_every_class_is_in_proportion_in_every_part(name):
    data = ready(name)
    whole = torch.cat([part.tensors[1] for part in data.parts])
    shares = whole.bincount() / len(whole)
    for part, expected in zip(data.parts, (0.7, 0.1, 0.2), strict=True):
        target = part.tensors[1]
        assert len(target) / len(whole) == pytest.approx(expected, abs=0.02)
        torch.testing.assert_close(target.bincount() / len(target), shares, atol=0.02, rtol=0)


def test_split_is_a_partition():
    target = torch.arange(103) % 4
    parts = split(target, val_fraction=0.1, test_fraction=0.2, seed=0)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(103))


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_are_upsampled_around_their_pixels(channels):
    small, large = ready("Digits"), ready("Digits", image_size=24, channels=channels)
    x, target = large.parts[0].tensors
    assert x.shape[1:] == (channels, 24, 24)
    assert torch.equal(target, small.parts[0].tensors[1])
    # At three times the size the middle of each pixel is a pixel.
    torch.testing.assert_close(x[:, :, 1::3, 1::3], small.parts[0].tensors[0].expand(-1, channels, -1, -1))


def test_digits_are_normalized():
    x = torch.cat([part.tensors[0] for part in ready("Digits").parts])
    assert x.mean().abs() < 1e-3
    assert x.std() == pytest.approx(1.0, abs=1e-3)


def test_copies_of_a_digit_are_distorted_and_stay_in_its_part():
    one, three = ready("Digits", image_size=16, channels=3), ready("Digits", image_size=16, channels=3, copies=3)
    for original, part in zip(one.parts, three.parts, strict=True):
        x, target = original.tensors
        images = part.tensors[0].reshape(3, *x.shape)
        assert torch.equal(images[0], x)
        assert torch.equal(part.tensors[1], target.repeat(3))
        changed = (images[1:] - x).flatten(2).norm(dim=2) / x.flatten(1).norm(dim=1)
        assert changed.median() > 0.1  # moved
        # Still nearer to their own digit than to others: the ink overlaps.
        flat = (images.clamp(min=0) / images.clamp(min=0).flatten(2).norm(dim=2)[:, :, None, None, None]).flatten(2)
        overlap = flat[1] @ flat[0].T
        assert (overlap.diagonal() > overlap.mean(dim=1)).float().mean() > 0.95


def test_more_digits_can_validate_with_as_many_to_train():
    usual, other = ready("Digits"), ready("Digits", val_fraction=0.25, test_fraction=0.05)
    sizes = [[len(part) for part in data.parts] for data in (usual, other)]
    assert sum(sizes[0]) == sum(sizes[1]) == 1797
    assert sizes[0][0] == pytest.approx(sizes[1][0], abs=10)  # rounded class by class
    assert sizes[0][1] == pytest.approx(180, abs=10)
    assert sizes[1][1] == pytest.approx(449, abs=10)


def test_distortions_depend_on_the_seed_alone():
    first, same, other = (ready("Digits", copies=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.parts[0].tensors[0], same.parts[0].tensors[0])
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 3, 4] = 1.0
    assert torch.equal(distort(x, 1.0, seed=1), distort(x, 1.0, seed=1))
    assert not torch.equal(distort(x, 1.0, seed=1), distort(x, 1.0, seed=2))
    assert not torch.equal(first.parts[0].tensors[0], other.parts[0].tensors[0])


def test_distorting_moves_ink_and_leaves_paper():
    paper = -PIXEL_MEAN / PIXEL_STD
    blank = torch.full((50, 1, 8, 8), paper)
    torch.testing.assert_close(distort(blank, 1.0, seed=0), blank)
    dot = blank.clone()
    dot[:, :, 3:5, 3:5] += 1.0
    moved = distort(dot, 1.0, seed=0) - paper
    mass = moved.sum(dim=(1, 2, 3)) / 4.0
    # A digit shrinks or grows with the product of both scales, sheared areas stay.
    assert mass.min() > (1 - SCALE) ** 2 / 1.6
    assert mass.max() < 1.6 / (1 - SCALE) ** 2
    axis = torch.arange(8.0) - 3.5
    for sums in (moved.sum(dim=2), moved.sum(dim=3)):
        centre = (sums.flatten(1) * axis).sum(dim=1) / sums.flatten(1).sum(dim=1)
        assert centre.abs().max() < 8 * SHIFT / (1 - SCALE) * 1.5
        assert centre.std() > 0.2


@pytest.mark.parametrize("name", ["BreastCancer", "Classification"])
def test_features_are_standardized_on_the_training_samples(name):
    x = ready(name).parts[0].tensors[0]
    torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(x.shape[1]), atol=1e-5, rtol=0)


def test_informative_columns_are_those_that_scikit_learn_made_informative():
    data = ready("Classification", seed=5)
    assert len(data.informative) == 5
    # The unshuffled table has them in front; find each of our columns there by its ranks.
    table = make_classification(
        200, 100, n_informative=5, n_redundant=0, n_clusters_per_class=1, flip_y=0.01, shuffle=False, random_state=5
    )[0]
    whole = torch.cat([part.tensors[0] for part in data.parts])
    informative = torch.tensor(table[:, :5], dtype=torch.float32)
    scaled = (informative - informative.mean(0)) / informative.std(0)
    ours = (whole - whole.mean(0)) / whole.std(0)
    distance = torch.cdist(scaled.sort(0).values.T, ours.sort(0).values.T)
    assert sorted(distance.argmin(dim=1).tolist()) == data.informative.tolist()


def test_adding_targets_are_the_marked_sums():
    x, target = ready("AddingProblem").parts[0].tensors
    numbers, marks = x.unbind(-1)
    assert torch.equal(marks.sum(1), torch.full((160,), 2.0))
    assert torch.equal(marks[:, :5].sum(1), torch.ones(160))
    assert torch.equal((numbers * marks).sum(1), target)


def test_copy_targets_repeat_the_string_after_the_request():
    tokens, target = ready("CopyTask").parts[1].tensors
    string = tokens[:, :3]
    assert string.min() >= 2
    assert string.max() <= 9
    assert torch.equal(tokens[:, 3:6], torch.zeros(20, 3, dtype=torch.int64))
    assert torch.equal(tokens[:, 6:], torch.tensor([1, 0, 0, 0]).expand(20, 4))
    assert torch.equal(target[:, -3:], string)
    assert (target[:, :-3] == -100).all()


def test_topics_predict_the_next_character():
    x, target = ready("Topics").parts[0].tensors
    assert torch.equal(x[:, 1:], target[:, :-1])
    assert torch.equal(x[1:, 0], target[:-1, -1])
    assert x.max() < VOCAB_SIZE
    assert "statement" in decode(x.flatten())


def test_unknown_characters_become_one_token():
    assert decode(encode("for x in y:\n")) == "for x in y:\n"
    assert encode("é…").tolist() == [VOCAB_SIZE - 1] * 2
    assert decode(encode("é")) == "\N{REPLACEMENT CHARACTER}"


def test_importing_the_zoo_imports_neither_torch_nor_scikit_learn():
    code = "import sys, lightning_accel.zoo; print([name for name in ('torch', 'sklearn') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_sampler_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = EpochSampler(20, seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    assert all(sorted(indices) == list(range(20)) for indices in orders.values())
    assert order(2, 3) == orders[2, 3]
    assert len(EpochSampler(20, 0)) == 20


def numbers(size=20):
    return torch.utils.data.TensorDataset(torch.arange(size))


def loader(**arguments):
    return training_loader(numbers(), batch_size=4, seed=0, **arguments)


def test_short_last_batch_is_dropped_unless_it_is_the_only_one():
    assert len(training_loader(numbers(10), batch_size=4, seed=0)) == 2
    assert len(training_loader(numbers(3), batch_size=4, seed=0)) == 1


@pytest.mark.parametrize("place", range(6))
def test_loader_goes_on_where_its_state_was_taken(place):
    whole = loader()
    whole.sampler.set_epoch(2)
    expected = [batch[0].tolist() for batch in whole]
    first = loader()
    first.sampler.set_epoch(2)
    for _ in islice(first, place):
        pass
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(2)
    assert [batch[0].tolist() for batch in second] == expected[place:]
    # Only the epoch that was interrupted is shortened.
    second.sampler.set_epoch(3)
    assert len(list(second)) == 5


def test_loader_runs_whole_epochs_after_the_one_of_its_state():
    first = loader()
    for _ in islice(first, 3):
        pass
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(1)
    assert len(list(second)) == 5


def test_loader_is_made_like_a_data_loader():
    assert [batch[0].tolist() for batch in ResumableLoader(numbers(4), batch_size=2)] == [[0, 1], [2, 3]]
