"""One training in several hosts: each file has ``train(run)``, which trains from a checkpoint on."""
