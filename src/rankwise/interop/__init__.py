"""Files and libraries of others: PEFT, transformers' Trainer."""
