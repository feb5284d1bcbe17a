"""What people look at: HTML reports and Perfetto timelines, made from plain documents and timeline rows."""
