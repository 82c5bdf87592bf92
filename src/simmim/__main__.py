from simmim.cli import main

raise SystemExit(main())
