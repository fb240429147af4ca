"""Draw samples from a trained Poisson flow: python sample.py CHECKPOINT --n 64 --out samples.png"""

from pfgm.commands import main

if __name__ == "__main__":
    main()
