"""``python -m sb3_ppo_ewma.zoo``"""

from sb3_ppo_ewma.zoo.command_line import main

if __name__ == "__main__":
    main()
