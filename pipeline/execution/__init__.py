"""From a recipe to finished work: the plan, the checks before it, Ray, and what is shown meanwhile."""
