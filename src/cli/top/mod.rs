//! `warmroute top`: a router's endpoints and decisions in a terminal, live.
//!
//! `/overview` is polled; a router that goes away is said to be gone and asked again. The terminal is given back as it
//! was on every way out: a key, a signal, an error, a panic.

mod model;
mod view;

use std::io::{self, IsTerminal, Write as _};
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use self::model::{Column, History, Overview};
use super::admin_port::{self, AdminPort};
use crate::config::Human;

/// Longest that the reader of keys goes on after the command has ended.
const KEY_POLL: Duration = Duration::from_millis(100);
/// Keys that may wait to be handled.
const KEY_QUEUE: usize = 64;

/// Which router, and how often.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    router: admin_port::Options,
    /// Time between two looks.
    #[arg(long, value_name = "DURATION", default_value = "1s")]
    interval: Human,
    /// Look twice, write the table as plain text, and end.
    #[arg(long)]
    once: bool,
}

/// The view cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The router cannot be asked, or with `--once` does not answer.
    #[error(transparent)]
    Router(#[from] admin_port::Error),
    /// It answers, but nothing that we know.
    #[error("the router's /overview is not what this version knows")]
    Answer(#[from] serde_json::Error),
    /// Standard output is a file or a pipe.
    #[error("standard output is not a terminal: use --once for plain text")]
    NoTerminal,
    /// The terminal cannot be used.
    #[error("cannot use the terminal")]
    Terminal(#[source] io::Error),
}

/// What is shown, and how.
#[derive(Debug)]
struct Screen {
    router: String,
    history: History,
    /// Why the last look failed.
    trouble: Option<String>,
    sort: Column,
    is_reversed: bool,
    is_paused: bool,
    filter: String,
    /// The filter while it is typed.
    typing: Option<String>,
}

/// Whether to go on.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    Quit,
}

impl Screen {
    fn new(router: String) -> Self {
        let (sort, typing) = (Column::Endpoint, None);
        let history = History::default();
        Self {
            router,
            history,
            trouble: None,
            sort,
            is_reversed: false,
            is_paused: false,
            filter: String::new(),
            typing,
        }
    }

    fn take(&mut self, answer: Result<Overview, Error>, at: Instant) {
        match answer {
            Ok(overview) => {
                self.trouble = None;
                self.history.take(at, overview);
            }
            Err(error) => self.trouble = Some(error.to_string()),
        }
    }

    fn press(&mut self, key: KeyEvent) -> Next {
        if key.kind == KeyEventKind::Release {
            return Next::GoOn;
        }
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Next::Quit;
        }
        match self.typing.take() {
            Some(text) => self.type_filter(text, key.code),
            None => return self.command(key.code),
        }
        Next::GoOn
    }

    fn type_filter(&mut self, mut text: String, key: KeyCode) {
        match key {
            KeyCode::Enter => return self.filter = text,
            KeyCode::Esc => return,
            KeyCode::Backspace => drop(text.pop()),
            KeyCode::Char(letter) => text.push(letter),
            _ => {}
        }
        self.typing = Some(text);
    }

    fn command(&mut self, key: KeyCode) -> Next {
        match key {
            KeyCode::Char('q') | KeyCode::Esc => return Next::Quit,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('r') => self.is_reversed = !self.is_reversed,
            KeyCode::Char('p') => self.is_paused = !self.is_paused,
            KeyCode::Char('/') => self.typing = Some(String::new()),
            _ => {}
        }
        Next::GoOn
    }
}

/// Runs the command.
///
/// # Errors
/// [`Error`] when there is no terminal, or with `--once` no answer.
pub fn run(options: Options) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| admin_port::Error::Setup(error.into()))?;
    let port = AdminPort::new(options.router)?;
    // Without a pause the router would be asked without end.
    let interval = options.interval.0.max(KEY_POLL);
    if options.once {
        return runtime.block_on(once(&port, interval));
    }
    if !io::stdout().is_terminal() {
        return Err(Error::NoTerminal);
    }
    // Its hook gives the terminal back before a panic's message is written.
    let terminal = ratatui::try_init().map_err(Error::Terminal)?;
    let result = runtime.block_on(live(&port, interval, terminal));
    ratatui::restore();
    result.map_err(Error::Terminal)
}

async fn once(port: &AdminPort, interval: Duration) -> Result<(), Error> {
    let mut screen = Screen::new(port.router().to_string());
    screen.history.take(Instant::now(), look(port).await?);
    tokio::time::sleep(interval).await;
    screen.history.take(Instant::now(), look(port).await?);
    io::stdout().write_all(view::plain(&screen).as_bytes()).map_err(Error::Terminal)
}

async fn look(port: &AdminPort) -> Result<Overview, Error> {
    Ok(serde_json::from_str(&port.get("/overview").await?)?)
}

async fn live(port: &AdminPort, interval: Duration, mut terminal: DefaultTerminal) -> io::Result<()> {
    let mut screen = Screen::new(port.router().to_string());
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let (sender, mut events) = mpsc::channel(KEY_QUEUE);
    tokio::task::spawn_blocking(move || read_keys(&sender));
    let mut looking = Box::pin(look(port));
    let mut is_looking = true;
    let mut ticks = tokio::time::interval(interval);
    // After answers that took longer, none of the missed ones is made up for.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        terminal.draw(|frame| view::draw(frame, &screen))?;
        tokio::select! {
            answer = &mut looking, if is_looking => {
                is_looking = false;
                screen.take(answer, Instant::now());
            }
            // A slow answer keeps the keys alive, and is not asked for twice.
            _ = ticks.tick(), if !is_looking => if !screen.is_paused {
                looking = Box::pin(look(port));
                is_looking = true;
            },
            event = events.recv() => match event {
                Some(Event::Key(key)) if screen.press(key) == Next::Quit => return Ok(()),
                Some(_) => {}
                None => return Ok(()),
            },
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hang_up.recv() => return Ok(()),
        }
    }
}

/// Until nobody takes them any more, or the terminal is gone.
fn read_keys(sender: &mpsc::Sender<Event>) {
    while !sender.is_closed() {
        match event::poll(KEY_POLL) {
            Ok(false) => {}
            Ok(true) => {
                let Ok(event) = event::read() else { return };
                if sender.blocking_send(event).is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(screen: &mut Screen, keys: &str) -> Next {
        let code = |letter| match letter {
            '\n' => KeyCode::Enter,
            letter => KeyCode::Char(letter),
        };
        keys.chars().map(|letter| screen.press(KeyEvent::from(code(letter)))).last().expect("a key")
    }

    #[test]
    fn keys_sort_reverse_pause_filter_and_quit() {
        let mut screen = Screen::new(String::new());
        assert_eq!(press(&mut screen, "srp"), Next::GoOn);
        assert_eq!((screen.sort, screen.is_reversed, screen.is_paused), (Column::Model, true, true));
        assert_eq!(press(&mut screen, "/q8\n"), Next::GoOn);
        assert_eq!(screen.filter, "q8");
        assert_eq!(press(&mut screen, "q"), Next::Quit);
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(screen.press(interrupt), Next::Quit);
    }
}
