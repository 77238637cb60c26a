"""Train with CPO. The same options as ``prefopt cpo``, for ``accelerate launch``:

    accelerate launch examples/scripts/cpo.py \\
        --model_name_or_path MODEL --dataset_name DATA --output_dir OUT \\
        --loss_type simpo --cpo_alpha 0 --beta 2.0
"""

from prefopt.cli.train import main

if __name__ == "__main__":
    main("cpo")
