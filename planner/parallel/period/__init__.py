"""Does rebalancing pay over a served period: windows of counts in order, what moving experts costs, policies side by side."""
