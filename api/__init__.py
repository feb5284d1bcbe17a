"""What people call from Python, and the commands with them: `import moeplan` offers these functions."""
