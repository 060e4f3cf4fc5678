"""A plain NumPy twin of TrainingDynamics: one sample after the other, in float32."""

import numpy as np

f32 = np.float32


class Twin:
    """What is known of every sample, as a dictionary; None for a sample that was never seen."""

    def __init__(self, num_samples, decay):
        self.samples = [None] * num_samples
        self.decay, self.step, self.nonfinite = f32(decay), 0, 0
        self.rest = f32(1 - decay)

    def update(self, indices, margin, score, loss, confidence, el2n, correct, counted):
        done = set()
        rows = zip(indices, margin, score, loss, confidence, el2n, correct, counted, strict=True)
        for row, (i, m, s, ce, p, e, right, counts) in enumerate(rows):
            if not counts or i in done:
                continue
            done.add(i)
            m, s, ce, p, e = map(f32, (m, s, ce, p, e))
            new = dict.fromkeys(("n", "correct", "learnt", "forgotten"), 0)
            new |= dict.fromkeys(("average", "aum", "mean", "m2", "el2n"), f32(0))
            old = self.samples[i] or new
            self.samples[i] = new = {**old, "margin": m, "score": s, "loss": ce}
            new["seen"] = self.step * 2**32 + 2**32 - 1 - row
            if not np.isfinite([m, p, e]).all():
                self.nonfinite += 1
                continue
            n = new["n"] = old["n"] + 1
            new["average"] = m if n == 1 else self.decay * old["average"] + self.rest * m
            new["aum"] = old["aum"] + (m - old["aum"]) / f32(n)
            new["mean"] = old["mean"] + (p - old["mean"]) / f32(n)
            new["m2"] = old["m2"] + (p - old["mean"]) * (p - new["mean"])
            new["el2n"] = old["el2n"] + (e - old["el2n"]) / f32(n)
            known = old["learnt"] > old["forgotten"]
            new["correct"] += bool(right)
            new["learnt"] += bool(right and not known)
            new["forgotten"] += bool(known and not right)
        self.step += 1

    def state(self):
        """Values, counts, last_seen and totals, as the op keeps them."""
        columns = "margin", "score", "loss", "average", "aum", "mean", "m2", "el2n"
        counts = "n", "correct", "learnt", "forgotten"
        known = [sample or {} for sample in self.samples]
        return (
            np.array([[s.get(c, 0) for c in columns] for s in known], f32).reshape(-1, 8),
            np.array([[s.get(c, 0) for c in counts] for s in known], np.int32).reshape(-1, 4),
            np.array([s.get("seen", -1) for s in known], np.int64),
            np.array([self.step, self.nonfinite], np.int64),
        )
