"""What a line of `metrics.jsonl` measures of time: no two runs have it alike, however equal they are."""

MEASURED = ("time", "images_per_second", "waiting", "mfu")
