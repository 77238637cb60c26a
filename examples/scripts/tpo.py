"""Train with TPO. The same options as ``prefopt tpo``, for ``accelerate launch``:

    accelerate launch examples/scripts/tpo.py \\
        --model_name_or_path MODEL --dataset_name DATA --output_dir OUT
"""

from prefopt.cli.train import main

if __name__ == "__main__":
    main("tpo")
