"""One training in several hosts. Each file has ``train(run)``, which begins or goes on."""
