"""Train with DPO. The same options as ``prefopt dpo``, for ``accelerate launch``:

    accelerate launch examples/scripts/dpo.py \\
        --model_name_or_path MODEL --dataset_name DATA --output_dir OUT
"""

from prefopt.cli.train import main

if __name__ == "__main__":
    main("dpo")
