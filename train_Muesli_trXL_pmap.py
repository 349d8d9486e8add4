"""Muesli on all devices of all processes: `python train_Muesli_trXL_pmap.py [KEY=VALUE ...]`.

Its settings are those of `train_Muesli_trXL.py`, with those of one process of several
(docs/scaling.md).
"""

from trxl.runs.run import main

from train_Muesli_trXL import config
from trainer_Muesli_trXL import MUESLI

if __name__ == "__main__":
    main(config, MUESLI, all_devices=True)
