"""Arguments, answers and copies of resources: kept apart from the batch's own objects, and restored."""
