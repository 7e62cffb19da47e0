"""Options that make whole runs small where what they prove does not depend on the size of a network."""

# One of timm's networks for tests: 0.3 M parameters instead of 14 M, and not as many hidden channels as the Student.
TEACHER = ["teacher.encoder=tu-test_byobnet", "teacher.decoder_channels=[32,16,8,8,4]"]
# The same for the Student: a step takes a fifth of the time.
STUDENT = ["student.encoder=tu-test_byobnet", "student.decoder_channels=[16,8,8,4,4]"]
