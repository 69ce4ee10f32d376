"""ResNet-50 on ImageNet, or any folder of train/ and val/ with a folder of pictures for each class,
by the recipe of torchvision's reference: SGD for 90 epochs, the rate divided by 10 after 30 and 60.

python examples/train_imagenet.py /data/imagenet runs/imagenet --batch-size 256
torchrun --nproc-per-node 8 examples/train_imagenet.py /data/imagenet runs/imagenet
"""

import argparse

import torch

from fusedres.training import Recipe, train
from fusedres.training.processes import Processes, launched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=32, help="in each process")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, help="that read pictures, for each process")
    parser.add_argument("--loader", default="workers", help="or dali")
    args = parser.parse_args()

    with launched("cuda" if torch.cuda.is_available() else "cpu") as device:
        batch = args.batch_size * Processes.current().count
        recipe = Recipe(
            epochs=args.epochs,
            batch_size=args.batch_size,
            optimizer="sgd",
            lr=0.1 * batch / 256,  # the rate grows with the batch (Goyal et al., 2017)
            nesterov=False,
            weight_decay=1e-4,
            schedule="step",
            warmup=5 / 90 if batch > 256 else 0.0,  # a large one needs a rise
            label_smoothing=0.0,
            augment="crop+flip",  # a random part of each picture, cut out as it is read
        )
        result = train(
            args.data,
            args.out,
            recipe,
            model=args.model,
            size=args.image_size,
            crop=0.875,  # of the test pictures: 224 of 256
            device=device,
            workers=args.workers,
            loader=args.loader,
        )
        if Processes.current().main:
            print(f"{result.test_accuracy:.1%} after {result.epochs} epochs")


if __name__ == "__main__":
    main()
