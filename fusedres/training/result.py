"""What a finished run has to say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What a finished run wrote to result.json.

    Attributes:
        test_accuracy, test_loss: of the final weights, on the test pictures; accuracy 0 to 1.
        train_accuracy: in the last epoch, on augmented pictures.
        epochs, steps: taken.
        seconds: of the whole run, tests and files included; what an interruption lost is not.
        img_per_s: pictures trained on a second, tests and files left out; median over epochs.
        model, variant, num_classes, parameters: the network.
        data, train_images, test_images: what it learnt from.
        batch_size, optimizer, lr, warmup, label_smoothing, augment, amp, compile, seed: the recipe;
            batch_size that of all processes together.
        device, processes: where the run ended, and how many there were.
    """

    test_accuracy: float
    test_loss: float
    train_accuracy: float
    epochs: int
    steps: int
    seconds: float
    img_per_s: float
    model: str
    variant: str
    num_classes: int
    parameters: int
    data: str
    train_images: int
    test_images: int
    batch_size: int
    optimizer: str
    lr: float
    warmup: float
    label_smoothing: float
    augment: str
    amp: str
    compile: bool
    seed: int
    device: str
    processes: int
