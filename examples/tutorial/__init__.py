"""The tutorial: a view of Flask and one of Django, as they were and batched, and what both reach."""
