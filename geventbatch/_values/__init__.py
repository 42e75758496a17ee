"""What operations are given and what they give: kept apart from the resource, and brought back."""
