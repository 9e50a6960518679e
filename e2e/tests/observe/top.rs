//! `warmroute top` in a real terminal, while the router works, is gone, and comes back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::service::Service;
use e2e::tool::run;

use crate::browser::program;
use crate::live::Live;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Between two looks of `top`.
const INTERVAL: Duration = Duration::from_millis(200);

/// A terminal with a shell in it. Its server is no daemon: it ends with its shell when this is dropped.
struct Terminal {
    tmux: PathBuf,
    socket: PathBuf,
    _server: Service,
}

impl Terminal {
    async fn start(dir: &Path) -> Self {
        let (tmux, socket) = (program("tmux", "tmux"), dir.join("tmux.sock"));
        let mut command = Command::new(&tmux);
        command.arg("-D").arg("-S").arg(&socket).args(["-f", "/dev/null"]);
        let server = Service::start("tmux", command, &dir.join("tmux.log")).unwrap();
        let terminal = Self { tmux, socket, _server: server };
        let deadline = Instant::now() + PATIENCE;
        while !terminal.socket.exists() {
            assert!(
                Instant::now() < deadline,
                "tmux makes no socket: {}",
                fs::read_to_string(dir.join("tmux.log")).unwrap()
            );
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        terminal.tmux(&["new-session", "-d", "-x", "140", "-y", "40", "env PS1='$ ' TERM=screen sh"]);
        terminal
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        run(Command::new(&self.tmux).arg("-S").arg(&self.socket).args(arguments)).unwrap()
    }

    /// What a person sees.
    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn press(&self, key: &str) {
        self.tmux(&["send-keys", key]);
    }

    /// Types a line for the shell.
    fn enter(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]);
        self.press("Enter");
    }

    async fn wait(&self, what: &str, is_wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let screen = self.screen();
            if is_wanted(&screen) {
                return screen;
            }
            assert!(Instant::now() < deadline, "{what} is not on the screen:\n{screen}");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

/// The lines of the endpoints.
fn rows(screen: &str, live: &Live) -> Vec<String> {
    let engines = live.engines.http();
    let is_row = |line: &&str| engines.iter().any(|engine| line.starts_with(&engine.to_string()));
    screen.lines().filter(is_row).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (cargo e2e tools) and Debian's tmux"]
async fn top_shows_the_router_until_it_is_left() {
    let _turn = crate::TURN.lock().await;
    let mut live = Live::start(&[]).await;
    let terminal = Terminal::start(live.dir.path()).await;
    let command = format!("{} top {} --interval {}ms", live.binary.display(), live.admin(), INTERVAL.as_millis());
    terminal.enter(&format!("clear; {command}; echo \"ended with $?\"; stty -a"));

    let n_engines = live.engines.http().len();
    let all_live = |screen: &str| rows(screen, &live).iter().filter(|row| row.contains(" live ")).count() == n_engines;
    let screen = terminal.wait("every endpoint", all_live).await;
    assert!(screen.contains("ready") && screen.contains("rollout active"), "{screen}");
    terminal.wait("a rate", |screen| !screen.contains(" 0.0 decisions/s")).await;
    let before = rows(&terminal.screen(), &live);
    terminal.wait("another number", |screen| rows(screen, &live) != before).await;
    terminal.wait("a decision", |screen| screen.contains("prefix_match")).await;

    terminal.press("s");
    terminal.wait("the next order", |screen| screen.contains("MODEL▲")).await;
    terminal.press("r");
    terminal.wait("the order reversed", |screen| screen.contains("MODEL▼")).await;
    terminal.press("p");
    let paused = terminal.wait("the pause", |screen| screen.contains("PAUSED")).await;
    tokio::time::sleep(4 * INTERVAL).await;
    // One answer may have been under way.
    let later = rows(&terminal.screen(), &live);
    tokio::time::sleep(4 * INTERVAL).await;
    assert_eq!(rows(&terminal.screen(), &live), later, "it is paused:\n{paused}");
    terminal.press("p");
    terminal.wait("new numbers", |screen| !screen.contains("PAUSED") && rows(screen, &live) != later).await;

    live.stop_router().await;
    let screen = terminal.wait("that the router is gone", |screen| screen.contains("NO ANSWER")).await;
    assert_eq!(rows(&screen, &live).len(), n_engines, "the last values stay:\n{screen}");
    live.restart_router().await;
    let is_back = |screen: &str| !screen.contains("NO ANSWER") && rows(screen, &live).len() == n_engines;
    terminal.wait("the router that is back", is_back).await;

    terminal.press("q");
    let screen = terminal.wait("the shell", |screen| screen.contains("ended with ") && screen.contains("icanon")).await;
    assert!(screen.contains("ended with 0"), "{screen}");
    let modes: Vec<&str> = screen.split([' ', '\n', ';']).collect();
    for mode in ["icanon", "echo", "isig", "opost", "icrnl"] {
        assert!(modes.contains(&mode), "the terminal is not as it was: {mode} is not in\n{screen}");
    }
    // The shell's own screen is back, with its cursor.
    let is_given_back = terminal.tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"]);
    assert_eq!(is_given_back.trim(), "0 1");
    assert!(!screen.contains("decisions/s"), "{screen}");
}
