"""What remains of all rows: a reduction of each task, merged in the order of the tasks."""
