"""Scores a million rows of Parquet files, finds wrong labels, and trains on the hardest rows.

    python examples/score_a_million_rows.py

takes less than a minute on two CPU cores, and 80 MB of disk for a while. Of the labels that it
makes, one in 500 is wrong. Files of any number of rows take the same memory.
"""

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.functional import cross_entropy

from marginops.scoring import Scorer, Smallest, SuspiciousLabels, read_result, score_files
from marginops.training import MarginSampler, TrainingDynamics

ROWS, FILE_ROWS, FEATURES, CLASSES = 1_000_000, 125_000, 32, 10
torch.manual_seed(0)
folder = tempfile.TemporaryDirectory()
data = Path(folder.name) / "data"
data.mkdir()
centers = torch.randn(CLASSES, FEATURES)
for first in range(0, ROWS, FILE_ROWS):
    target = torch.randint(CLASSES, (FILE_ROWS,))
    features = centers[target] + torch.randn(FILE_ROWS, FEATURES)
    is_wrong = torch.rand(FILE_ROWS) < 0.002
    label = torch.where(is_wrong, (target + 1) % CLASSES, target)
    values = pa.array(features.half().flatten().numpy())
    embedding = pa.FixedSizeListArray.from_arrays(values, FEATURES)
    rows = {"embedding": embedding, "label": label.numpy(), "is_wrong": is_wrong.numpy()}
    # Embeddings in a dictionary, which is pyarrow's default, would take five times as long to read.
    pq.write_table(pa.table(rows), data / f"{first:07}.parquet", use_dictionary=False)

head = torch.nn.Linear(FEATURES, CLASSES)
optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
for rows in torch.arange(FILE_ROWS).split(1000):
    loss = cross_entropy(head(features[rows]), label[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.save(head.state_dict(), Path(folder.name) / "head.pt")

scorer = Scorer(Path(folder.name) / "head.pt", column="embedding", target="label")
output = Path(folder.name) / "scores"
summary = score_files(data, scorer, output, reductions=[Smallest(20_000), SuspiciousLabels(1_000)])
result = read_result(output)
print(f"{summary['rows']['rows']:,} rows have a score.")

issues = torch.tensor(result.label_issues["row"].to_pylist())
is_wrong = torch.from_numpy(pq.read_table(data, columns=["is_wrong"])["is_wrong"].to_numpy())
print(f"Of the 1,000 most suspicious labels, {is_wrong[issues].sum():,} are wrong.")
kept = result.indices[~torch.isin(result.indices, issues)]
sampler = MarginSampler(TrainingDynamics(num_samples=ROWS), subset=kept)
print(f"Training draws {len(sampler):,} of the {len(kept):,} other rows with the smallest margins.")
