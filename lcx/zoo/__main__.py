"""python -m lcx.zoo list | train NAME [--seed N] [--steps N] [--out FOLDER] | verify NAME"""

from __future__ import annotations

import argparse
import json
import sys

from .. import zoo
from ..errors import LcxError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lcx.zoo", description="Small trained models of the book."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the models there are")
    train = commands.add_parser("train", help="train a model from its recipe")
    train.add_argument("name")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--steps", type=int, default=None)
    train.add_argument("--out", default=None, help="folder to write to (default: the zoo itself)")
    commands.add_parser("verify", help="check files and figures against the card").add_argument("name")
    args = parser.parse_args()
    try:
        if args.command == "list":
            for name in zoo.names():
                print(f"{name:12} {zoo.recipe(name).about}")
        elif args.command == "train":
            card = zoo.train(args.name, out=args.out, seed=args.seed, steps=args.steps)
            print(json.dumps(card["heldout"], indent=1))
        else:
            print(json.dumps(zoo.verify(args.name), indent=1))
    except LcxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
