"""What turns any finished schedule into another: cuts of the backward pass, and actions added."""
