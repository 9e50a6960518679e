//! Draws the state of `top`, as a screen or as plain text.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Row as Cells, Table};

use super::Screen;
use super::model::{Column, History, Overview, Recent, Row, Totals};
use crate::cli::columns::{Align, Columns, printable};

const TITLES: [(&str, Align, Option<Column>); 8] = [
    ("ENDPOINT", Align::Left, Some(Column::Endpoint)),
    ("MODEL", Align::Left, Some(Column::Model)),
    ("EVENTS", Align::Left, None),
    ("BLOCKS", Align::Right, Some(Column::Blocks)),
    ("IN FLIGHT", Align::Right, Some(Column::InFlight)),
    ("DEC/S", Align::Right, Some(Column::Rate)),
    ("HIT 1M", Align::Right, Some(Column::Hit)),
    ("AVOIDED", Align::Right, None),
];
const RECENT_TITLES: [&str; 6] = ["REQUEST", "AGE", "OUTCOME", "PROMPT", "MATCHED", "PICK"];

pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let header = header(screen);
    let rows = screen.history.rows(&screen.filter, screen.sort, screen.is_reversed);
    let heights = [
        Constraint::Length(u16::try_from(header.len()).unwrap_or(u16::MAX)),
        Constraint::Min(4),
        Constraint::Max(12),
        Constraint::Length(1),
    ];
    let [top, middle, bottom, foot] = Layout::vertical(heights).areas(frame.area());
    let lines: Vec<Line<'_>> = header.into_iter().map(Line::from).collect();
    frame.render_widget(Paragraph::new(lines), top);
    let titles = TITLES.map(|(title, _, column)| match column {
        Some(column) if column == screen.sort => format!("{title}{}", if screen.is_reversed { "▼" } else { "▲" }),
        _ => title.to_owned(),
    });
    let widths = [22, 24, 16, 10, 11, 8, 8, 9].map(Constraint::Max);
    let title = Style::new().add_modifier(Modifier::REVERSED);
    let body = rows.iter().map(|row| Cells::new(cells(row)).style(style(row)));
    frame.render_widget(Table::new(body, widths).header(Cells::new(titles).style(title)), middle);
    let recent = screen.history.newest().map(|newest| newest.recent.as_slice()).unwrap_or_default();
    let widths = [38, 9, 16, 8, 9, 22].map(Constraint::Max);
    let body = recent.iter().map(|one| Cells::new(recent_cells(one)));
    frame.render_widget(Table::new(body, widths).header(Cells::new(RECENT_TITLES).style(title)), bottom);
    let foot_text = match &screen.typing {
        Some(text) => format!("filter: {text}_"),
        None => "q quit  s sort  r reverse  / filter  p pause".to_owned(),
    };
    frame.render_widget(Line::from(foot_text), foot);
}

/// The same once, for what is no terminal.
pub(super) fn plain(screen: &Screen) -> String {
    let mut columns = Columns::new(&TITLES.map(|(title, align, _)| (title, align)));
    for row in screen.history.rows(&screen.filter, screen.sort, screen.is_reversed) {
        columns.push(&cells(&row));
    }
    format!("{}\n\n{columns}", header(screen).join("\n"))
}

/// What is above the table, without what a terminal would obey.
fn header(screen: &Screen) -> Vec<String> {
    header_lines(screen).iter().map(|line| printable(line)).collect()
}

fn header_lines(screen: &Screen) -> Vec<String> {
    let Some(newest) = screen.history.newest() else {
        let found = screen.trouble.as_deref().unwrap_or("asking");
        return vec![format!("warmroute at {}: {found}", screen.router)];
    };
    let ready = if newest.ready { "ready".to_owned() } else { format!("not ready: {}", newest.not_ready.join(", ")) };
    let pause = if screen.is_paused { "  PAUSED" } else { "" };
    let mut lines = vec![
        format!("warmroute {} at {}  {ready}  rollout {}{pause}", newest.version, screen.router, newest.rollout),
        numbers(&screen.history, newest),
        degraded(&screen.history, &newest.totals),
    ];
    if let Some(trouble) = &screen.trouble {
        lines.push(format!("NO ANSWER, the values are old: {trouble}"));
    }
    lines
}

fn numbers(history: &History, newest: &Overview) -> String {
    format!(
        "{:.1} decisions/s  hit ratio {} now, {} in the last minute  in flight {}  index {} of {}",
        history.rate(|overview| overview.totals.decisions),
        percent(history.hit_now()),
        percent(history.hit_minute()),
        newest.endpoints.iter().map(|one| one.in_flight).sum::<u64>(),
        bytes(newest.index.bytes),
        bytes(newest.index.limit_bytes),
    )
}

fn degraded(history: &History, totals: &Totals) -> String {
    let by_reason = totals.fallbacks.keys().map(|reason| {
        (reason.clone(), history.rate(|overview| overview.totals.fallbacks.get(reason).copied().unwrap_or(0)))
    });
    let others = [
        ("left to Envoy".to_owned(), history.rate(|overview| overview.totals.left_to_envoy)),
        ("refused".to_owned(), history.rate(|overview| overview.totals.refused)),
    ];
    let all: Vec<String> = by_reason
        .chain(others)
        .filter(|(_, rate)| *rate > 0.0)
        .map(|(reason, rate)| format!("{reason} {rate:.1}/s"))
        .collect();
    format!("degraded: {}", if all.is_empty() { "nothing".to_owned() } else { all.join(", ") })
}

fn cells(row: &Row) -> [String; 8] {
    [
        row.endpoint.clone(),
        row.model.clone(),
        row.state.clone(),
        row.n_blocks.to_string(),
        row.in_flight.to_string(),
        format!("{:.1}", row.rate),
        percent(row.hit),
        row.avoided_ms.map(|ms| format!("{:.1} s", ms as f64 / 1000.0)).unwrap_or_default(),
    ]
}

fn style(row: &Row) -> Style {
    match (row.avoided_ms, row.state.as_str()) {
        (Some(_), _) => Style::new().fg(Color::Red),
        (None, "live") => Style::new(),
        (None, _) => Style::new().fg(Color::Yellow),
    }
}

fn recent_cells(one: &Recent) -> [String; 6] {
    let number = |value: Option<u64>| value.map(|n| n.to_string()).unwrap_or_default();
    [
        one.request_id.clone().unwrap_or_default(),
        format!("{:.1} s", one.age_ms as f64 / 1000.0),
        one.outcome.clone().or_else(|| one.verdict.clone()).unwrap_or_default(),
        number(one.prompt_tokens),
        number(one.matched_tokens),
        one.pick.clone().unwrap_or_default(),
    ]
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = ((n.max(1).ilog2() / 10) as usize).min(UNITS.len() - 1);
    format!("{:.1} {}", n as f64 / 1024_f64.powi(unit as i32), UNITS[unit])
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::tests::overview;
    use super::*;

    fn drawn(screen: &Screen) -> String {
        let mut terminal = Terminal::new(TestBackend::new(130, 24)).expect("a terminal");
        terminal.draw(|frame| draw(frame, screen)).expect("a drawing");
        terminal.backend().to_string()
    }

    fn screen() -> Screen {
        let mut screen = Screen::new("http://127.0.0.1:9090".to_owned());
        let start = Instant::now();
        screen.history.take(start, overview(10));
        screen.history.take(start + Duration::from_secs(1), overview(30));
        screen
    }

    #[test]
    fn screen_has_header_endpoints_and_decisions() {
        let text = drawn(&screen());
        for part in ["ready", "20.0 decisions/s", "hit ratio 50.0 % now", "10.0.0.1:8001", "1.0 KiB of 4.0 KiB", "abc"]
        {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(plain(&screen()).contains("10.0.0.1:8000  m      live       300"), "{}", plain(&screen()));
    }

    #[test]
    fn router_that_is_gone_is_said_to_be() {
        let mut screen = screen();
        screen.trouble = Some("connection refused".to_owned());
        assert!(drawn(&screen).contains("NO ANSWER, the values are old: connection refused"));
    }
}
